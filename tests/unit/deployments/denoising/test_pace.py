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
    for now in (0, 1, 2, 3, 5, 7, 9):
        pace.end_step(float(now))
    assert pace.seconds_left(3) == 6.0
