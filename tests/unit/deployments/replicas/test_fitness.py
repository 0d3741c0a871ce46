"""A replica that cannot work says so, begins with nothing more, and lets its requests be done by others."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError

from deployments.engine.under_way import UnderWay
from deployments.errors import (
    CannotResumeError,
    GenerationFailedError,
    HandOffError,
    InvalidRequestError,
    PipelineFailedError,
    ReplicaRefusedError,
    ReplicaUnfitError,
)
from deployments.media.pool import MediaWorkerError
from deployments.messages import UNFOLLOWED, Envelope
from deployments.model import WatchdogArgs
from deployments.replicas.fitness import Fitness, hangs
from deployments.stage_pipeline.sessions.pipeline_code import PipelineCode

SUSPECTED = Envelope(tried_until=3)
STICKY = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Device:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


async def fails_with(fitness: Fitness, error: BaseException, envelope: Envelope = UNFOLLOWED) -> BaseException:
    """What the caller of a request that raises `error` sees."""
    try:
        async with fitness.work(envelope):
            raise error
    except BaseException as seen:  # noqa: BLE001
        return seen


ERRORS = [RuntimeError("shapes do not fit"), STICKY, IndexError("of the pipeline"), ValueError("anything")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_an_error_on_a_device_that_is_dead_ends_the_replica_and_not_the_request(error: Exception) -> None:
    fitness = Fitness(Device(STICKY), ())
    seen = await fails_with(fitness, error)
    assert isinstance(seen, ReplicaUnfitError)
    assert seen.__cause__ is error
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fitness.check()
    with pytest.raises(ReplicaRefusedError, match="illegal memory access"):
        async with fitness.work(UNFOLLOWED):
            raise AssertionError("it may not begin")


@pytest.mark.parametrize("error", ERRORS, ids=repr)
async def test_an_error_on_a_device_that_works_is_the_requests_own(error: Exception) -> None:
    device = Device()
    fitness = Fitness(device, ())
    assert await fails_with(fitness, error) is error
    assert device.asked == 1
    fitness.check()


async def test_a_device_that_does_not_answer_is_dead() -> None:
    released = threading.Event()
    fitness = Fitness(lambda: released.wait(30) and None, (), timeout_s=0.05)
    seen = await fails_with(fitness, RuntimeError("something"))
    released.set()
    assert isinstance(seen, ReplicaUnfitError)
    assert "within 0.05 s" in str(seen)


FULL = [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]


@pytest.mark.parametrize("full", FULL, ids=repr)
async def test_a_device_that_is_full_is_alive(full: Exception) -> None:
    fitness = Fitness(Device(full), ())
    error = RuntimeError("something")
    assert await fails_with(fitness, error) is error


def resume_error(cause: Exception) -> Exception:
    return caused(CannotResumeError("the steps cannot be skipped"), cause)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


NOT_OF_THE_DEVICE = [
    torch.OutOfMemoryError("too large"),
    InvalidRequestError("too wide"),
    HandOffError("it does not fit"),
    GenerationFailedError("its deadline has passed"),
    RayTaskError("call", "traceback", RayActorError()),
    resume_error(torch.OutOfMemoryError("too large")),
    caused(PipelineFailedError("ValueError: too long"), ValueError("too long")),
    resume_error(caused(PipelineFailedError("ValueError: too long"), ValueError("too long"))),
]


@pytest.mark.parametrize("error", NOT_OF_THE_DEVICE, ids=lambda error: type(error).__name__)
async def test_the_device_is_not_asked_after_what_says_nothing_of_it(error: Exception) -> None:
    device = Device(STICKY)
    assert await fails_with(Fitness(device, ()), error) is error
    assert device.asked == 0


async def test_a_device_that_died_on_the_way_to_a_checkpoint_is_found_dead() -> None:
    assert isinstance(await fails_with(Fitness(Device(STICKY), ()), resume_error(STICKY)), ReplicaUnfitError)


async def test_many_errors_at_once_ask_the_device_once() -> None:
    device = Device(STICKY)
    fitness = Fitness(device, ())
    seen = await asyncio.gather(*(fails_with(fitness, RuntimeError(str(each))) for each in range(8)))
    assert {type(each) for each in seen} == {ReplicaUnfitError}
    assert device.asked == 1


async def test_a_request_that_is_cancelled_says_nothing_of_the_device() -> None:
    device = Device(STICKY)
    assert isinstance(await fails_with(Fitness(device, ()), asyncio.CancelledError()), asyncio.CancelledError)
    assert device.asked == 0


async def test_media_workers_that_cannot_be_started_end_the_replica() -> None:
    fitness = Fitness(Device(), ())
    assert isinstance(await fails_with(fitness, MediaWorkerError("no more processes")), ReplicaUnfitError)
    with pytest.raises(RuntimeError, match="no more processes"):
        fitness.check()


async def test_a_sign_that_was_seen_once_stays() -> None:
    signs: list[str | None] = [None, "the engine's thread has ended", None]
    fitness = Fitness(Device(), [lambda: signs.pop(0)])
    fitness.check()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="has ended"):
            fitness.check()


# --- suspects ---


async def test_a_replica_tries_one_suspected_request_at_a_time_and_others_meanwhile() -> None:
    fitness = Fitness(Device(), ())
    async with fitness.work(SUSPECTED), fitness.work(UNFOLLOWED):
        with pytest.raises(ReplicaRefusedError, match="another suspected"):
            async with fitness.work(SUSPECTED):
                raise AssertionError("it may not begin")
    async with fitness.work(SUSPECTED):
        pass


async def test_a_suspected_request_that_is_past_its_step_lets_the_next_one_in() -> None:
    fitness = Fitness(Device(), ())
    async with fitness.work(SUSPECTED) as first:
        first.reached(2)
        with pytest.raises(ReplicaRefusedError):
            async with fitness.work(SUSPECTED):
                pass
        first.reached(3)
        async with fitness.work(SUSPECTED):
            first.end()
            with pytest.raises(ReplicaRefusedError):
                async with fitness.work(SUSPECTED):
                    pass


# --- what never ends ---


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


ARGS = WatchdogArgs(forward_timeout_s=10, first_forward_timeout_s=100, times_usual=None)


def test_work_that_does_not_end_is_seen_and_the_first_of_its_kind_may_take_longer() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    sign = hangs("a forward", under_way, ARGS)

    def after(seconds: float) -> str | None:
        clock.now += seconds
        return sign()

    assert after(1000) is None, "nothing is under way"
    with under_way.work("kind"):
        assert after(99) is None
        assert after(2) == "a forward has not ended for 101 s, at most 100 s are allowed"
    with under_way.work("kind"):
        assert after(9) is None
        assert after(2) == "a forward has not ended for 11 s, at most 10 s are allowed"
    with under_way.work("another kind"):
        assert after(11) is None


def test_what_failed_is_still_to_be_done_for_the_first_time() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    with pytest.raises(ValueError, match="no"), under_way.work("kind"):
        raise ValueError("no")
    with under_way.work("kind"):
        assert under_way.look().is_first


def test_without_a_limit_nothing_hangs() -> None:
    clock: Any = Clock()
    under_way = UnderWay(clock)
    none = WatchdogArgs(forward_timeout_s=None, first_forward_timeout_s=None, times_usual=None)
    sign = hangs("a forward", under_way, none)
    with under_way.work("kind"):
        clock.now = 1e9
        assert sign() is None


BY_THE_USUAL = WatchdogArgs(forward_timeout_s=600, first_forward_timeout_s=3600, times_usual=20, usual_timeout_s=60)


def done(under_way: UnderWay, clock: Clock, seconds: float, times: int = 4, kind: str = "kind") -> None:
    for _ in range(times):
        with under_way.work(kind):
            clock.now += seconds


@pytest.mark.parametrize(("usual_s", "limit_s"), [(0.2, 60), (5.0, 100), (50.0, 600)])
def test_what_takes_far_longer_than_usual_hangs_and_what_is_usual_never_does(usual_s: float, limit_s: float) -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    done(under_way, clock, usual_s)
    sign = hangs("a forward", under_way, BY_THE_USUAL)
    with under_way.work("kind"):
        clock.now += limit_s - 1
        assert sign() is None
        clock.now += 2
        reason = sign()
        assert reason is not None
        assert reason.startswith(f"a forward has not ended for {limit_s + 1:.0f} s")
    with under_way.work("another kind"):
        clock.now += limit_s + 1
        assert sign() is None, "the first of its kind is judged by its own limit"


def test_what_is_usual_is_known_only_after_some_and_without_the_first() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    done(under_way, clock, 1000, times=1)  # it compiled
    done(under_way, clock, 0.1, times=2)
    with under_way.work("kind"):
        assert under_way.look().usual_s is None
    done(under_way, clock, 0.1, times=1)
    with under_way.work("kind"):
        assert under_way.look().usual_s == pytest.approx(0.1)


def test_a_slow_one_among_many_raises_what_is_usual_for_a_while() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    done(under_way, clock, 1.0)
    done(under_way, clock, 10.0, times=1)
    done(under_way, clock, 1.0, times=1)
    with under_way.work("kind"):
        assert under_way.look().usual_s == pytest.approx(9.0)
    done(under_way, clock, 1.0, times=30)
    with under_way.work("kind"):
        assert under_way.look().usual_s == pytest.approx(1.0)


def test_irregular_work_is_judged_by_the_fixed_limits_alone() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    sign = hangs("a turn", under_way, BY_THE_USUAL)
    for _ in range(10):
        with under_way.work("a turn", is_regular=False):
            clock.now += 0.1
    with under_way.work("a turn", is_regular=False):
        clock.now += 599
        assert sign() is None
        clock.now += 2
        assert sign() is not None


def test_work_inside_another_counts_by_itself() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    done(under_way, clock, 0.1)
    sign = hangs("a forward", under_way, BY_THE_USUAL)
    with under_way.work("kind"):
        clock.now += 5
        with under_way.work("it compiles"):
            clock.now += 1000
            assert sign() is None
        assert under_way.look().seconds == 5
        assert sign() is None


def test_who_waits_for_what_another_one_has_does_not_hang() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    done(under_way, clock, 0.1)
    waited: list[float | None] = [None]
    sign = hangs("an encoding", under_way, BY_THE_USUAL, lambda: waited[0])
    with under_way.work("kind"):
        clock.now += 100
        assert sign() is None, "another one has it"
        waited[0] = clock.now
        assert sign() is None, "it has just got it"
        clock.now += 61
        assert sign() is not None


def test_a_lock_tells_until_when_a_thread_may_have_waited_for_it() -> None:
    clock = Clock()
    code, me = PipelineCode(clock), threading.get_ident()
    clock.now = 1
    with code:
        clock.now = 2
        assert code.waited_until(me) == 1
        assert code.waited_until(me + 1) is None
        clock.now = 3
    assert code.waited_until(me + 1) == 3


def test_a_thread_is_idle_since_its_last_work() -> None:
    clock = Clock()
    under_way = UnderWay(clock)
    done(under_way, clock, 5, times=1)
    assert under_way.idle_since == 5
    with under_way.work("kind"):
        assert under_way.idle_since is None
