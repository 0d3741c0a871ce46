"""Requests that are sent when their time has come, whatever became of those before (an open loop).

Latency counts from the time at which a request was to be sent. A load generator that waits for answers, or that
starts its clock when it gets to send, hides the waiting that it causes: coordinated omission.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Timed(Generic[T]):
    """One request; times in seconds since the start of the load."""

    intended_s: float
    sent_s: float
    ended_s: float
    answer: T

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.intended_s

    @property
    def lag_s(self) -> float:
        """How late the load generator itself was."""
        return self.sent_s - self.intended_s


def poisson_times(rate: float, duration_s: float, seed: int) -> list[float]:
    """Moments in seconds, of a Poisson process with `rate` a second."""
    chance, times = random.Random(seed), []
    time_s = chance.expovariate(rate)
    while time_s < duration_s:
        times.append(time_s)
        time_s += chance.expovariate(rate)
    return times


async def open_loop(times: Sequence[float], send: Callable[[int, float], Awaitable[T]]) -> list[Timed[T]]:
    """Calls `send(number, intended)` at each of `times`; `intended` is on the clock of time.perf_counter."""
    start = time.perf_counter()

    async def one(number: int, intended_s: float) -> Timed[T]:
        await asyncio.sleep(max(0.0, start + intended_s - time.perf_counter()))
        sent_s = time.perf_counter() - start
        answer = await send(number, start + intended_s)
        return Timed(intended_s, sent_s, time.perf_counter() - start, answer)

    return list(await asyncio.gather(*(one(number, intended_s) for number, intended_s in enumerate(times))))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
