"""The time that is left, by the steps that a request made lately."""

from deployments.denoising.pace import StepPace


def test_a_wait_before_a_step_or_among_the_steps_is_not_taken_for_their_pace() -> None:
    pace, told = StepPace(), []
    for now in (100.0, 100.5, 170.5, 171.0, 171.5):  # the first was waited for, and another for 70 s
        pace.end_step(now)
        told.append(pace.seconds_left(10))
    assert told == [None, 5.0, 5.0, 5.0, 5.0]


def test_steps_that_become_slower_are_heard_of() -> None:
    pace = StepPace()
    for now in (0, 1, 2, 3, *range(5, 40, 2)):
        pace.end_step(float(now))
    assert pace.seconds_left(3) == 6.0


def test_steps_that_a_cache_makes_quick_count_with_those_between_them() -> None:
    pace = StepPace()
    for number in range(60):  # one of three is computed, in 3 s
        pace.end_step(3.0 * (number // 3))
        if number > 20:
            assert abs((pace.seconds_left(30) or 0) - 30) < 10
