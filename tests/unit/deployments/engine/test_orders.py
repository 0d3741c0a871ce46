"""Orders and predicted costs: who goes first, by how long such forwards take."""

import math

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.fiber import Fiber
from deployments.engine.orders import ORDERS, first_come, smallest_slack
from deployments.engine.step_costs import SHAPES_KEPT, StepCosts

seconds = st.floats(0.01, 100)
forwards = st.integers(0, 100)


def fiber(deadline: float | None, remaining: int = 1, done: int = 0, step_s: float = 1.0) -> Fiber:
    return Fiber("f", deadline=deadline, remaining_forwards=lambda: remaining, forwards=done, step_s=step_s)


@given(seconds, forwards, forwards, seconds, seconds)
def test_the_slack_of_a_waiting_fiber_only_shrinks(
    deadline: float, remaining: int, done: int, step_s: float, later: float
) -> None:
    waiting = fiber(deadline, remaining, done, step_s)
    assert smallest_slack(waiting, later) <= smallest_slack(waiting, 0.0)


@given(seconds, forwards, seconds)
def test_less_time_or_more_work_goes_first(deadline: float, remaining: int, step_s: float) -> None:
    calm = fiber(deadline + 1, remaining, 5, step_s)
    assert smallest_slack(fiber(deadline, remaining, 5, step_s), 0.0) < smallest_slack(calm, 0.0)
    assert smallest_slack(fiber(deadline + 1, remaining + 1, 5, step_s), 0.0) <= smallest_slack(calm, 0.0)


def test_a_fiber_without_a_deadline_goes_before_all_others() -> None:
    assert smallest_slack(fiber(None), 0.0) == -math.inf


def test_first_come_asks_only_for_the_arrival() -> None:
    assert first_come(Fiber("f", arrived=3.0, deadline=1.0), 10.0) == 3.0
    assert set(ORDERS) == {"slack", "fifo"}


# --- step costs ---


def test_nothing_is_predicted_before_the_first_measurement() -> None:
    assert StepCosts().predict("shape", 1) is None


@given(st.lists(seconds, min_size=1))
def test_a_prediction_lies_within_what_was_measured(measured: list[float]) -> None:
    costs = StepCosts()
    for each in measured:
        costs.record("shape", 2, each)
    predicted = costs.predict("shape", 2)
    assert predicted is not None
    assert min(measured) * 0.999 <= predicted <= max(measured) * 1.001


@given(seconds, st.integers(1, 8), st.integers(1, 8))
def test_more_samples_than_were_measured_cost_in_proportion_and_fewer_no_less(s: float, known: int, asked: int) -> None:
    costs = StepCosts()
    costs.record("shape", known, s)
    predicted = costs.predict("shape", asked)
    assert predicted is not None
    assert math.isclose(predicted, s * max(1, asked / known))


def test_the_oldest_shapes_are_forgotten() -> None:
    costs = StepCosts()
    for shape in range(SHAPES_KEPT + 1):
        costs.record(shape, 1, 1.0)
    assert costs.predict(0, 1) is None
    assert costs.predict(SHAPES_KEPT, 1) == 1.0
    assert len(costs.table()) == SHAPES_KEPT
