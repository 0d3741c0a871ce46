"""Orders and predicted costs: who goes first, by how long such forwards take."""

import math

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.fiber import Fiber
from deployments.engine.orders import ORDERS, earliest_deadline, first_come
from deployments.engine.step_costs import SHAPES_KEPT, StepCosts

seconds = st.floats(0.01, 100)
forwards = st.integers(0, 100)


def fiber(deadline: float | None, remaining: int = 1, done: int = 0, step_s: float = 1.0) -> Fiber:
    return Fiber("f", deadline=deadline, remaining_forwards=lambda: remaining, forwards=done, step_s=step_s)


@given(seconds, forwards, forwards, seconds, seconds)
def test_a_waiting_fiber_only_becomes_more_urgent(
    deadline: float, remaining: int, done: int, step_s: float, later: float
) -> None:
    waiting = fiber(deadline, remaining, done, step_s)
    assert earliest_deadline(waiting, later) <= earliest_deadline(waiting, 0.0)


@given(seconds, forwards, forwards, seconds, seconds)
def test_of_fibers_of_one_duration_the_first_come_stays_before_the_others(
    deadline: float, remaining: int, other: int, step_s: float, later: float
) -> None:
    steps = remaining + other
    first, second = fiber(deadline, remaining, other, step_s), fiber(deadline + 1, other, remaining, step_s)
    assert first.forwards + first.remaining_forwards() == second.forwards + second.remaining_forwards() == steps
    assert earliest_deadline(first, later) < earliest_deadline(second, later)


def test_a_fiber_of_unknown_duration_without_a_deadline_goes_before_all_others() -> None:
    assert earliest_deadline(fiber(None, step_s=0.0), 0.0) == -math.inf


def test_without_a_deadline_a_fiber_has_three_times_its_own_duration() -> None:
    long = Fiber("l", arrived=1.0, remaining_forwards=lambda: 30, forwards=10, step_s=1.0)
    short = Fiber("s", arrived=20.0, remaining_forwards=lambda: 8, step_s=1.0)
    assert earliest_deadline(long, 21.0) == 1 + 3 * 40 - 21
    assert earliest_deadline(short, 21.0) == 20 + 3 * 8 - 21


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
