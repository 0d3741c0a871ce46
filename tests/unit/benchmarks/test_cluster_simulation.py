"""The simulation against queueing theory, and the conservation of requests and accelerators."""

import random
import statistics
from collections.abc import Sequence
from math import factorial

import pytest

from benchmarks.cluster_simulation import Arrival, Outcome, RequestKind, Stage, View, simulate
from benchmarks.scaling_policies import Fixed
from tests.support.further import further

ARRIVALS = 40_000
UNIT_S = 0.05  # of time in the theory's formulas; the controller acts every second


def latencies(outcome: Outcome) -> list[float]:
    return [latency_s for _, latency_s in outcome.latencies_s]


def poisson(rate: float, units: float | None, count: int = ARRIVALS) -> list[Arrival]:
    """Requests of one stage, `rate` a unit of time; so many units of work each, or exponential with mean 1."""
    chance, time_s, arrivals = random.Random(5), 0.0, []
    for _ in range(count):
        time_s += UNIT_S * chance.expovariate(rate)
        work = chance.expovariate(1) if units is None else units
        arrivals.append(Arrival(time_s, RequestKind("request", (UNIT_S * work,))))
    return arrivals


def mean_latency(stage: Stage, arrivals: Sequence[Arrival], replicas: int = 1) -> float:
    """In units of time."""
    return statistics.fmean(latencies(simulate([stage], arrivals, replicas, Fixed([replicas]), [replicas]))) / UNIT_S


def erlang_c(servers: int, load: float) -> float:
    """The probability that a request must wait; `load` in erlangs."""
    waiting = load**servers / factorial(servers) * servers / (servers - load)
    return waiting / (sum(load**k / factorial(k) for k in range(servers)) + waiting)


@pytest.mark.parametrize("load", [further(0.3), 0.7])
def test_one_replica_with_exponential_work_is_the_m_m_1_queue(load: float) -> None:
    latency_s = mean_latency(Stage("stage", max_ongoing_requests=1), poisson(load, None))
    assert latency_s == pytest.approx(1 / (1 - load), rel=0.05)


@pytest.mark.parametrize("load", [further(0.3), 0.7])
def test_one_replica_with_equal_work_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    latency_s = mean_latency(Stage("stage", max_ongoing_requests=1), poisson(load, 1.0))
    assert latency_s == pytest.approx(1 + load / (2 * (1 - load)), rel=0.03)


@pytest.mark.parametrize(("replicas", "load"), [(2, 1.4), further(8, 6.0)])
def test_several_replicas_with_exponential_work_wait_as_erlang_says(replicas: int, load: float) -> None:
    latency_s = mean_latency(Stage("stage", max_ongoing_requests=1), poisson(load, None), replicas)
    assert latency_s == pytest.approx(1 + erlang_c(replicas, load) / (replicas - load), rel=0.05)


def test_several_replicas_with_equal_work_wait_about_half_as_long_as_with_exponential() -> None:
    # M/D/c by Cosmetatos' approximation, good to about a percent.
    replicas, load = 4, 3.2
    waiting_s = erlang_c(replicas, load) / (replicas - load) / 2
    use = load / replicas
    waiting_s *= 1 + (1 - use) * (replicas - 1) * ((4 + 5 * replicas) ** 0.5 - 2) / (16 * use * replicas)
    latency_s = mean_latency(Stage("stage", max_ongoing_requests=1), poisson(load, 1.0), replicas)
    assert latency_s == pytest.approx(1 + waiting_s, rel=0.03)


@pytest.mark.parametrize("units", [further(None), 1.0])
def test_a_batch_that_gains_nothing_is_processor_sharing_whatever_the_distribution(units: float | None) -> None:
    stage = Stage("stage", max_ongoing_requests=10_000, batch=10_000, marginal_cost=1.0)
    assert mean_latency(stage, poisson(0.6, units)) == pytest.approx(1 / (1 - 0.6), rel=0.05)


def test_a_batch_that_costs_nothing_more_never_makes_a_request_slower() -> None:
    stage = Stage("stage", max_ongoing_requests=10_000, batch=10_000, marginal_cost=0.0)
    outcome = simulate([stage], poisson(5.0, 1.0, 500), 1, Fixed([1]), [1])
    assert latencies(outcome) == pytest.approx([UNIT_S] * 500)


def test_a_request_goes_through_all_stages_one_after_another() -> None:
    kind = RequestKind("request", (1.0, 2.0, 3.0), extra_s=0.5)
    stages = [Stage(name) for name in ("encoder", "denoiser", "vae")]
    outcome = simulate(stages, [Arrival(10.0, kind)], 3, Fixed([1, 1, 1]), [1, 1, 1])
    assert latencies(outcome) == pytest.approx([6.5])


def test_a_replica_that_is_asked_for_serves_after_its_start_and_occupies_its_accelerator_meanwhile() -> None:
    def two_from_the_start(_: View) -> Sequence[int]:
        return [2]

    # The first decision is at 1 s, so the second replica serves from 11 s on; the first one is busy up to 100 s.
    arrivals = [Arrival(0.0, RequestKind("long", (100.0,))), Arrival(2.0, RequestKind("short", (1.0,)))]
    stage = Stage("stage", start_s=10.0, max_ongoing_requests=1)
    outcome = simulate([stage], arrivals, 2, two_from_the_start, [1])
    assert latencies(outcome) == pytest.approx([11 + 1 - 2, 100])
    assert outcome.accelerator_s == pytest.approx(100 + 99)


def test_a_replica_that_is_taken_away_ends_its_request_before_its_accelerator_starts_another_stage() -> None:
    def move_one(view: View) -> Sequence[int]:
        return [1, 2] if view.time_s < 5 else [2, 1]

    kind = RequestKind("request", (1.0, 50.0))
    stages = [Stage("first", start_s=4.0, max_ongoing_requests=1), Stage("second", max_ongoing_requests=1)]
    arrivals = [Arrival(0.0, kind), Arrival(0.5, kind)]
    outcome = simulate(stages, arrivals, 3, move_one, [1, 2])
    assert latencies(outcome) == pytest.approx([51.0, 51.5])
    assert outcome.accelerator_s == pytest.approx(3 * outcome.ended_s)


def test_replicas_never_occupy_more_accelerators_than_there_are() -> None:
    def ask_for_all(view: View) -> Sequence[int]:
        return [1 + int(view.time_s) % 7, 1 + int(view.time_s) % 5]

    kind = RequestKind("request", (0.3, 0.7))
    arrivals = [Arrival(0.2 * number, kind) for number in range(500)]
    stages = [Stage("first", start_s=3.0), Stage("second", start_s=2.0)]
    outcome = simulate(stages, arrivals, 6, ask_for_all, [1, 1])
    assert len(outcome.latencies_s) == 500
    assert outcome.accelerator_s <= 6 * outcome.ended_s


def test_what_would_be_late_is_refused_and_the_rest_is_in_time() -> None:
    kind = RequestKind("request", (1.0,), slo_s=3.0)
    arrivals = [Arrival(0.1 * number, kind) for number in range(100)]
    stage = Stage("stage", max_ongoing_requests=1)
    unbounded = simulate([stage], arrivals, 1, Fixed([1]), [1])
    bounded = simulate([stage], arrivals, 1, Fixed([1]), [1], refuse_late=True)
    assert unbounded.num_refused == 0
    assert unbounded.num_good < 5
    assert bounded.num_refused + len(bounded.latencies_s) == 100
    assert bounded.num_good == len(bounded.latencies_s) >= 10


def test_replicas_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="fit into 2 accelerators"):
        simulate([Stage("stage")], [], 2, Fixed([3]), [3])
