"""The linear program: exact where the answer is known, and above whatever a simulated policy reaches."""

from collections.abc import Callable
from functools import cache

import pytest

pytest.importorskip("scipy", reason="pip install scipy")

from benchmarks.cluster_simulation import Arrival, Policy, RequestKind, Stage, simulate
from benchmarks.goodput_bound import Bound, bound
from benchmarks.load_profile import PROFILES, arrivals_of
from benchmarks.scaling_policies import Fixed, ReplicaRatio, ServeDefault
from tests.support.further import all_but

ACCELERATORS = 12
STAGES = (
    Stage("encoder", start_s=5.0),
    Stage("denoiser", start_s=20.0, max_ongoing_requests=4, batch=4, marginal_cost=0.8),
    Stage("vae", start_s=5.0),
)
LONG = RequestKind("long", (0.1, 6.0, 0.5), slo_s=25.0, extra_s=0.1)
SHORT = RequestKind("short", (0.1, 0.4, 0.5), slo_s=5.0, extra_s=0.1)
POLICIES: dict[str, Callable[[], Policy]] = {
    "fixed": lambda: Fixed((1, 9, 2)),
    "thirds": lambda: Fixed((4, 4, 4)),
    "serve": lambda: ServeDefault(3, ACCELERATORS),
    "ratio": lambda: ReplicaRatio(ACCELERATORS),
}


@cache
def swinging_load(profile: str) -> tuple[list[Arrival], Bound]:
    arrivals = arrivals_of(PROFILES[profile], STAGES, (LONG, SHORT), ACCELERATORS, peak=1.3, scale_s=0.3, seed=3)
    return arrivals, bound(STAGES, arrivals, ACCELERATORS, 5.0)


def test_all_requests_are_good_when_there_is_room() -> None:
    arrivals = [Arrival(float(number), SHORT) for number in range(50)]
    best = bound(STAGES, arrivals, 30, 5.0)
    assert best.num_good == pytest.approx(50)


def test_an_overloaded_stage_does_what_its_accelerators_can_and_no_more() -> None:
    kind = RequestKind("request", (1.0,), slo_s=2.0)
    arrivals = [Arrival(number / 10, kind) for number in range(1000)]  # 10 a second for 100 s, on 4 accelerators
    best = bound([Stage("stage")], arrivals, 4, 2.0)
    assert 400 <= best.num_good <= 4 * 106  # the last slot of work ends at most three slots after the last arrival
    assert best.accelerator_s == pytest.approx(best.num_good, rel=1e-3)


def test_a_request_that_takes_longer_than_its_slo_alone_is_never_good() -> None:
    kind = RequestKind("request", (3.0,), slo_s=2.0)
    assert bound([Stage("stage")], [Arrival(0.0, kind)], 4, 1.0).num_good == 0


def test_moving_accelerators_to_another_stage_costs_the_time_that_replicas_take_to_start() -> None:
    first, second = RequestKind("first", (1.0, 0.0), 2.0), RequestKind("second", (0.0, 1.0), 2.0)
    arrivals = [Arrival(number / 4, first if number < 400 else second) for number in range(800)]
    at_once = bound([Stage("a"), Stage("b")], arrivals, 4, 2.0)
    slowly = bound([Stage("a", start_s=20.0), Stage("b", start_s=20.0)], arrivals, 4, 2.0)
    assert at_once.num_good == pytest.approx(800)
    assert slowly.num_good < 780


@pytest.mark.parametrize("profile", all_but(["burst"], PROFILES))
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("refuse_late", [False, True])
def test_no_policy_is_better_than_the_bound(policy: str, profile: str, refuse_late: bool) -> None:
    arrivals, best = swinging_load(profile)
    reached = simulate(STAGES, arrivals, ACCELERATORS, POLICIES[policy](), (1, 6, 2), refuse_late=refuse_late)
    assert 0 < reached.num_good <= best.num_good * (1 + 1e-6) <= len(arrivals) * (1 + 1e-5)


def test_requests_without_an_slo_have_no_bound() -> None:
    with pytest.raises(ValueError, match="no SLO"):
        bound([Stage("stage")], [Arrival(0.0, RequestKind("request", (1.0,)))], 1, 1.0)
