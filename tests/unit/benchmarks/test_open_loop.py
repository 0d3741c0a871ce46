"""Latency from the intended time, with a server that is slow and with a client that is.

The bounds are all from below, so a slow machine cannot break them.
"""

import asyncio
import time
from itertools import pairwise

import pytest

from benchmarks.open_loop import open_loop, percentile, poisson_times

SERVICE_S = 0.05


async def test_waiting_behind_earlier_requests_is_part_of_the_latency() -> None:
    one_at_a_time = asyncio.Lock()
    times = [0.01 * number for number in range(10)]

    async def send(number: int, _: float) -> int:
        async with one_at_a_time:
            await asyncio.sleep(SERVICE_S)
        return number

    timed = await open_loop(times, send)
    assert [each.answer for each in timed] == list(range(10))
    for number, each in enumerate(timed):
        assert each.latency_s >= (number + 1) * SERVICE_S - times[number] - 0.005  # the clock of asyncio is coarse


async def test_requests_that_the_client_itself_sends_late_count_from_when_they_were_due() -> None:
    async def send(number: int, _: float) -> None:
        if number == 0:
            time.sleep(0.3)  # noqa: ASYNC251 - the client hangs, so the others are sent late

    timed = await open_loop([0.0, 0.1, 0.2], send)
    assert timed[1].lag_s >= 0.19
    assert timed[1].latency_s >= 0.19
    assert timed[2].latency_s >= 0.09


async def test_all_requests_are_sent_although_none_is_answered() -> None:
    sent, answers = [], asyncio.Event()

    async def send(number: int, _: float) -> None:
        sent.append(number)
        if len(sent) == 20:
            answers.set()
        await answers.wait()

    await asyncio.wait_for(open_loop([0.001 * number for number in range(20)], send), 60)
    assert sorted(sent) == list(range(20))


def test_arrivals_are_poisson_and_the_same_for_the_same_seed() -> None:
    times = poisson_times(5.0, 2000, seed=1)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times == poisson_times(5.0, 2000, seed=1) != poisson_times(5.0, 2000, seed=2)
    assert times[-1] < 2000
    assert mean == pytest.approx(0.2, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)


def test_a_percentile_is_one_of_the_values() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert percentile([1.0], 0.0) == 1.0
