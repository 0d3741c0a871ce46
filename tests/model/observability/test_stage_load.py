"""The seconds of work that a stage counts, by a clock that the test moves."""

import contextlib
from contextlib import ExitStack

import pytest

from deployments.observability.stage_load import StageLoad


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stage(clock: Clock) -> StageLoad:
    return StageLoad(clock)


def work(stage: StageLoad, clock: Clock, seconds: float) -> None:
    with stage.request(), stage.work():
        clock.now += seconds


def test_a_stage_that_was_idle_has_no_work(stage: StageLoad, clock: Clock) -> None:
    clock.now += 50
    load = stage.load()
    assert (load.busy_s, load.outstanding_s, load.request_s, load.arrived, load.present) == (0, 0, 0, 0, 0)


def test_requests_that_there_was_no_room_for_are_counted_by_themselves(stage: StageLoad, clock: Clock) -> None:
    stage.note_refused(3)
    work(stage, clock, 1)
    stage.note_refused(2)
    assert (stage.load().refused, stage.load().arrived) == (5, 1)


def test_busy_seconds_grow_during_a_request_and_not_between_two(stage: StageLoad, clock: Clock) -> None:
    with stage.request(), stage.work():
        clock.now += 3
        assert stage.load().busy_s == pytest.approx(3)
        clock.now += 1
    clock.now += 50
    work(stage, clock, 2)
    assert stage.load().busy_s == pytest.approx(6)


def test_requests_that_share_the_device_make_it_busy_once_and_cost_their_share(stage: StageLoad, clock: Clock) -> None:
    with ExitStack() as first, ExitStack() as second:
        for stack in (first, second):
            stack.enter_context(stage.request())
            stack.enter_context(stage.work())
        clock.now += 6
        first.close()
        clock.now += 2
    load = stage.load()
    assert load.busy_s == pytest.approx(8)
    assert load.request_s == pytest.approx((6 * 0.8 + 2) / 1.8)


def test_the_seconds_of_a_request_follow_a_change_of_the_requests(stage: StageLoad, clock: Clock) -> None:
    for _ in range(20):
        work(stage, clock, 1)
    assert stage.load().request_s == pytest.approx(1)
    for _ in range(20):
        work(stage, clock, 5)
    assert stage.load().request_s == pytest.approx(5, rel=0.05)


def test_what_waits_and_what_is_left_of_the_request_in_work_is_outstanding(stage: StageLoad, clock: Clock) -> None:
    work(stage, clock, 4)
    with stage.request(), stage.request(), stage.work():
        clock.now += 1
        load = stage.load()
        assert load.present == 2
        assert load.outstanding_s == pytest.approx(3 + 4)
        clock.now += 100  # longer than predicted: nothing is left of it, and the other still waits
        assert stage.load().outstanding_s == pytest.approx(4)


def test_a_request_that_left_before_its_turn_is_no_longer_there(stage: StageLoad, clock: Clock) -> None:
    work(stage, clock, 4)
    with contextlib.suppress(KeyError), stage.request():
        raise KeyError
    load = stage.load()
    assert (load.arrived, load.present, load.outstanding_s) == (2, 0, 0)


def test_the_work_of_a_request_that_failed_is_part_of_what_the_next_one_costs(stage: StageLoad, clock: Clock) -> None:
    with contextlib.suppress(KeyError), stage.request(), stage.work():
        clock.now += 2
        raise KeyError
    assert stage.load().request_s == 0
    work(stage, clock, 3)
    assert stage.load().request_s == pytest.approx(5)
