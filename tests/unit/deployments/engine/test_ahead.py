"""The host runs ahead of an accelerator: the device never waits, and an error that shows late finds its request."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch

from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.statistics import BatchRun
from deployments.errors import ReplicaUnfitError
from tests.support.simulated_time import PATIENCE_S, Asked, SimulatedDevice, free, linear, serve

STEPS = 20


def test_the_device_is_never_idle_while_a_request_has_forwards_left() -> None:
    device = SimulatedDevice(lambda _: 0.2)
    (taken,), _ = serve(device, [Asked(STEPS)])
    assert device.idle_s <= 0.2 * 0.01, "but for the first of its kind, which is waited for"
    assert taken == pytest.approx(0.2 * STEPS, rel=0.01)


def test_the_host_is_at_most_two_turns_ahead() -> None:
    device = SimulatedDevice(lambda _: 0.001)  # as long as ten launches
    ahead: list[float] = []
    run = device.run

    def watched(*args: Any) -> Any:
        ahead.append(device.free_at - device.clock.now())
        return run(*args)

    device.run = watched  # type: ignore[method-assign]
    serve(device, [Asked(STEPS)])
    assert max(ahead) <= 2 * 0.001


def test_who_comes_during_a_long_forward_is_in_the_next_batch() -> None:
    """The batch is decided when the forward is nearly done, not when the host could."""
    device = SimulatedDevice(free)
    warm = [Asked(110), Asked(110)]
    taken, _ = serve(device, [*warm, Asked(20, at=500.0), Asked(5, at=505.8)])
    assert taken[3] <= 0.2 + 5 + 0.01


def test_what_forwards_cost_is_known_though_nobody_waits_for_them() -> None:
    told: list[Any] = []
    _, engine = serve(SimulatedDevice(linear), [Asked(STEPS), Asked(STEPS, at=3.5, width=5)], measure=told.append)
    assert list(engine.costs.table().values()) == [{1: 1.0}, {1: 1.0}]
    turns = [each for each in told if isinstance(each, BatchRun)]
    assert len(turns) == 2 * STEPS
    assert sum(turn.seconds for turn in turns) == pytest.approx(engine.statistics.seconds) == pytest.approx(2 * STEPS)


# --- errors that show late ---


def run_two(device: SimulatedDevice, steps: int = 6) -> tuple[list[Future[Any]], list[Fiber], Engine]:
    """Two requests of two shapes by turns, each with its own kind of forwards."""
    engine = Engine(executor=device, clock=device.clock, max_wait_s=0.0, order="fifo", merging="always")
    fibers = [Fiber(f"request {i}", arrived=0.0) for i in range(2)]

    def work(fiber: Fiber, width: int) -> list[float]:
        seen = []
        for step in range(steps):
            output = engine.run(fiber, None, "model", None, (), {"x": torch.full((1, width), float(step))})
            seen.append(float(output[0, 0]))
        return seen

    def open_the_door() -> list[Future[Any]]:
        for fiber in fibers:
            engine.begin(fiber)
        return [engine.submit(fiber, lambda f=fiber, w=4 + i: work(f, w)) for i, fiber in enumerate(fibers)]

    results = engine.submit(Fiber("door"), open_the_door).result(PATIENCE_S)
    return results, fibers, engine


ERRORS = [torch.OutOfMemoryError("seen when it was waited for"), RuntimeError("an illegal memory access")]


@pytest.mark.parametrize("error", ERRORS, ids=["memory", "device"])
def test_an_error_seen_one_turn_late_goes_to_the_request_whose_forward_it_was(error: Exception) -> None:
    device = SimulatedDevice(lambda _: 0.001)
    device.late_errors = {2: error}  # the first request's third forward
    results, fibers, engine = run_two(device)
    with pytest.raises(ReplicaUnfitError, match=str(error)) as raised:
        results[0].result(PATIENCE_S)
    assert raised.value.__cause__ is error, "it goes on from its checkpoint; the cause tells whether the device is dead"
    assert results[1].result(PATIENCE_S) == [2.0 * step for step in range(6)]
    assert fibers[0].forwards < 6
    assert device.freed == isinstance(error, torch.OutOfMemoryError)
    engine.close()


@pytest.mark.parametrize("error", ERRORS, ids=["memory", "device"])
def test_an_error_of_the_last_forward_is_seen_before_its_request_is_told_that_it_is_done(error: Exception) -> None:
    device = SimulatedDevice(lambda _: 0.001)
    device.late_errors = {5: error}
    engine, fiber = Engine(executor=device, clock=device.clock), Fiber("request")
    engine.begin(fiber)

    def work() -> str:
        for step in range(6):
            engine.run(fiber, None, "model", None, (), {"x": torch.full((1, 4), float(step))})
        return "done"

    with pytest.raises(ReplicaUnfitError, match=str(error)):
        engine.call(fiber, work)
    engine.end(fiber)
    engine.close()


def test_a_batch_that_does_not_fit_is_halved_where_that_shows_only_later() -> None:
    """The first batch of a size is waited for, so its fibers have not gone on."""
    device = SimulatedDevice(free)
    run = device.run

    def overflow(component: str, module: Any, context: Any, arguments: dict[str, Any]) -> Any:
        if len(arguments["x"]) > 2:
            device.late_errors[len(device.sizes)] = torch.OutOfMemoryError("seen when it was waited for")
        return run(component, module, context, arguments)

    device.run = overflow  # type: ignore[method-assign]
    taken, engine = serve(device, [Asked(10)] * 4, merging="always")
    assert len(taken) == 4, "each got its own numbers"
    assert engine.statistics.bisections == 1
    assert sum(size > 2 for size in device.sizes) == 1
    assert device.sizes.count(2) > 10


def test_after_an_error_that_came_late_forwards_of_that_kind_are_waited_for_again() -> None:
    device = SimulatedDevice(free)
    device.late_errors = {2: torch.OutOfMemoryError("seen when it was waited for")}
    results, _, engine = run_two(device)
    with pytest.raises(ReplicaUnfitError):
        results[0].result(PATIENCE_S)
    results[1].result(PATIENCE_S)
    fiber = Fiber("again")
    engine.begin(fiber)
    again = len(device.sizes)  # and once more with what was freed
    device.late_errors = {at: torch.OutOfMemoryError("once more") for at in (again, again + 1)}
    with pytest.raises(torch.OutOfMemoryError, match="once more"):
        engine.call(fiber, lambda: engine.run(fiber, None, "model", None, (), {"x": torch.ones(1, 4)}))
    engine.end(fiber)
    engine.close()
