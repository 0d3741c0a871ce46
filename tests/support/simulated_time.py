"""A clock that only moves when somebody waits for it, and a device that computes by it: `serve` runs a load on them.

Nothing here takes real time, so what comes out is the same on every machine. The device takes `seconds_of(samples)` for
a forward; `runs_ahead`: the host goes on while it computes, else each call returns when it is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber

PATIENCE_S = 60
LAUNCH_S = 1e-4  # of the host, to give the device a forward

SecondsOf = Callable[[int], float]


def linear(samples: int) -> float:
    """A device that one sample keeps busy."""
    return float(samples)


def free(samples: int) -> float:
    """A device on which a batch takes what one sample takes."""
    return 1.0


class SimulatedClock:
    """Arrivals that are due are let in wherever time goes on."""

    def __init__(self) -> None:
        self._now = 0.0
        self.arrivals: list[tuple[float, Callable[[], None]]] = []  # the earliest first

    def now(self) -> float:
        return self._now

    def advance_to(self, then: float) -> None:
        while self.arrivals and self.arrivals[0][0] <= then:
            due, arrive = self.arrivals.pop(0)
            self._now = max(self._now, due)
            arrive()
        self._now = max(self._now, then)

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        if not self.arrivals and seconds is None:
            changed.wait(PATIENCE_S)  # for the load itself, or the end
        else:
            next_arrival = self.arrivals[0][0] if self.arrivals else float("inf")
            self.advance_to(min(next_arrival, self._now + (float("inf") if seconds is None else seconds)))


@dataclass
class SimulatedMark:
    device: SimulatedDevice
    at: float
    error: Exception | None = None

    def is_reached(self) -> bool:
        return self.device.clock.now() >= self.at and self.error is None

    def wait(self) -> None:
        if self.device.clock.now() < self.at:
            self.device.waits += 1
            self.device.clock.advance_to(self.at)
        if self.error is not None:
            raise self.error

    def seconds_since(self, earlier: SimulatedMark) -> float:
        return self.at - earlier.at


@dataclass
class SimulatedDevice:
    """An executor: it doubles the argument `x`."""

    seconds_of: SecondsOf
    clock: SimulatedClock = field(default_factory=SimulatedClock)
    runs_ahead: bool = True
    free_at: float = 0.0
    idle_s: float = 0.0  # while a fiber had begun and none was done
    sizes: list[int] = field(default_factory=list)
    waits: int = 0  # of the host, for work that was not done yet
    late_errors: dict[int, Exception] = field(default_factory=dict)  # by the number of the run, counted from 0
    freed: int = 0
    _broken: Exception | None = None

    def run(self, component: str, module: Any, context: Any, arguments: dict[str, Any]) -> Any:
        samples = len(arguments["x"])
        self._broken = self.late_errors.get(len(self.sizes))
        self.sizes.append(samples)
        now = self.clock.now()
        if now > self.free_at:
            self.idle_s += now - self.free_at
        self.free_at = max(now, self.free_at) + self.seconds_of(samples)
        self.clock.advance_to(now + LAUNCH_S if self.runs_ahead else self.free_at)
        return 2 * arguments["x"]

    def mark(self) -> SimulatedMark:
        return SimulatedMark(self, max(self.clock.now(), self.free_at), self._broken)

    def free_memory(self) -> None:
        self.freed += 1


@dataclass(frozen=True)
class Asked:
    """A request of so many forwards that comes at that time."""

    steps: int
    at: float = 0.0
    width: int = 4
    deadline_s: float | None = None
    passes: int = 1  # forwards that it asks for at once; they count among its steps


def serve(device: SimulatedDevice, load: Sequence[Asked], **settings: Any) -> tuple[list[float], Engine]:
    """The seconds from the arrival to the end of each request; the engine is closed."""
    engine = Engine(**{"max_wait_s": 0.0, **settings}, executor=device, clock=device.clock)
    begin = device.clock.now()
    ended: dict[int, float] = {}
    results: list[Future[None]] = []
    everybody_came = threading.Event()

    def arrive(number: int, asked: Asked) -> None:
        fiber = Fiber(f"request {number}", arrived=begin + asked.at)
        fiber.remaining_forwards = lambda: asked.steps - fiber.forwards
        if asked.deadline_s is not None:
            fiber.deadline = fiber.arrived + asked.deadline_s
        engine.begin(fiber)

        def work() -> None:
            for step in range(0, asked.steps, asked.passes):
                given = [torch.full((1, asked.width), float(number + step + i)) for i in range(asked.passes)]
                forwards = [engine.ask(fiber, None, "model", None, (), {"x": x}) for x in given]
                for x, forward in reversed([*zip(given, forwards, strict=True)]):
                    assert torch.equal(engine.wait(forward), 2 * x)
            ended[number] = max(device.clock.now(), device.free_at) - fiber.arrived
            engine.end(fiber)

        results.append(engine.submit(fiber, work))
        if len(results) == len(load):
            everybody_came.set()

    def open_the_door() -> None:
        in_turn = sorted(enumerate(load), key=lambda each: each[1].at)
        device.clock.arrivals = [(begin + a.at, lambda n=n, a=a: arrive(n, a)) for n, a in in_turn]  # type: ignore[misc]
        device.clock.advance_to(begin)

    engine.submit(Fiber("door"), open_the_door).result(PATIENCE_S)
    assert everybody_came.wait(PATIENCE_S)
    for result in results:
        result.result(PATIENCE_S)
    engine.close()
    return [ended[number] for number in range(len(load))], engine


def mean(seconds: Sequence[float]) -> float:
    return sum(seconds) / len(seconds)


def p95(seconds: Sequence[float]) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(0.95 * len(seconds)))]
