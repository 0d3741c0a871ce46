"""What the policy decides, given what Serve's controller tells it."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from deployments.messages import STAGES as STAGES_OF_MESSAGES
from deployments.observability.stage_load import Load
from serve_app.autoscaling import ReplicaRatio
from serve_app.autoscaling.pool import Demand, Turn, fits, share, take_turns
from serve_app.autoscaling.turns import Place
from serve_app.autoscaling.work import STAGES

NOW = 1000.0
LOOK_BACK_S = 30.0
FOR_THE_RATE: dict[str, Any] = {"target_utilisation": 1.0, "target_queue_s": 1e15}  # whatever is queued
Told = dict[str, AutoscalingContext]


def series(before: float, last: float) -> list[TimeStampedValue]:
    return [TimeStampedValue(NOW - LOOK_BACK_S, before), TimeStampedValue(NOW, last)]


def replica(
    stage: str, *, request_s: float, rate: float = 0.0, waiting: float = 0.0, refused: float = 0.0
) -> dict[str, Any]:
    """What one replica reported in the look-back period: a stage to which `rate` requests come in a second.

    `waiting` requests are there all the time; the others were done as they came. `refused` is per second.
    """
    now = Load(
        busy_s=500 + rate * LOOK_BACK_S * request_s,
        outstanding_s=waiting * request_s,
        request_s=request_s,
        arrived=int(100 + rate * LOOK_BACK_S),
        present=int(waiting) or 1,
        refused=int(7 + refused * LOOK_BACK_S),
    )
    before = asdict(now) | {"busy_s": 500.0, "arrived": 100, "refused": 7}
    return {f"{stage}_{name}": series(before[name], value) for name, value in asdict(now).items()}


def context(
    *replicas: Mapping[str, Any],
    bounds: tuple[int, int] = (1, 100),
    target: int = 1,
    queued: float = 0.0,
    ongoing: float = 0.0,
    state: dict[str, Any] | None = None,
    time_s: float = NOW,
) -> AutoscalingContext:
    """What the controller tells of a deployment whose replicas reported this."""
    raw: dict[str, dict[str, Any]] = {}
    for number, reported in enumerate(replicas):
        for name, values in reported.items():
            raw.setdefault(name, {})[f"replica-{number}"] = values
    given: dict[str, Any] = {
        "deployment_id": None,
        "deployment_name": "",
        "app_name": None,
        "current_num_replicas": target,
        "target_num_replicas": target,
        "running_replicas": [],
        "total_num_requests": ongoing,
        "total_queued_requests": queued,
        "aggregated_metrics": None,
        "raw_metrics": raw,
        "capacity_adjusted_min_replicas": bounds[0],
        "capacity_adjusted_max_replicas": bounds[1],
        "policy_state": state or {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": time_s,
        "config": AutoscalingConfig(min_replicas=bounds[0], max_replicas=bounds[1], look_back_period_s=LOOK_BACK_S),
    }
    return AutoscalingContext(**given)


def decide(told: Told, **settings: Any) -> dict[str, int]:
    return ReplicaRatio(**settings)(told)[0]


def three_stages(rate: float, seconds: tuple[float, float, float], num_waiting: float = 50) -> Told:
    """All stages see the same requests; `num_waiting` of them are in the denoisers."""
    encoder, denoiser, vae = seconds
    return {
        "Encoder": context(replica("encoder", request_s=encoder, rate=rate)),
        "Denoiser": context(replica("denoiser", request_s=denoiser, rate=rate, waiting=num_waiting)),
        "VAE": context(replica("vae", request_s=vae, rate=rate)),
    }


# --- how many are needed ---


def test_replicas_are_in_the_ratio_of_the_stages_work() -> None:
    decided = decide(three_stages(rate=10, seconds=(0.2, 4.0, 0.8)), target_utilisation=0.8, target_queue_s=1e12)
    assert decided == {"Encoder": 3, "Denoiser": 50, "VAE": 10}


def test_a_model_whose_vae_is_the_work_gets_vaes() -> None:
    decided = decide(three_stages(rate=2, seconds=(0.3, 0.25, 2.2)), target_queue_s=60)
    assert decided == {"Encoder": 1, "Denoiser": 1, "VAE": 6}


def test_what_is_queued_is_done_within_the_target_besides_what_comes() -> None:
    told = {"Denoiser": context(replica("denoiser", request_s=2.0, rate=1.0, waiting=60))}
    assert decide(told, target_queue_s=60) == {"Denoiser": 2 + 2}
    assert decide(told, target_queue_s=20) == {"Denoiser": 2 + 6}


def test_requests_that_wait_at_their_callers_count_like_those_in_the_replicas() -> None:
    busy = replica("denoiser", request_s=2.0, rate=0.5, waiting=4)
    assert decide({"Denoiser": context(busy)}, target_queue_s=30) == {"Denoiser": 2}
    assert decide({"Denoiser": context(busy, queued=60)}, target_queue_s=30) == {"Denoiser": 1 + 5}


def test_the_same_number_of_longer_requests_needs_more_replicas() -> None:
    short = {"Denoiser": context(replica("denoiser", request_s=0.5, rate=1.0, waiting=8))}
    long = {"Denoiser": context(replica("denoiser", request_s=6.0, rate=1.0, waiting=8))}
    assert decide(short) == {"Denoiser": 1}
    assert decide(long) == {"Denoiser": 8}


def test_what_is_in_work_in_each_replica_is_no_queue() -> None:
    four = [replica("denoiser", request_s=10.0, rate=0.06, waiting=1) for _ in range(4)]  # busy for 0.6 of the time
    assert decide({"Denoiser": context(*four, target=4)}, cooldown_s=0) == {"Denoiser": 3}


def test_the_stages_of_one_model_hear_nothing_of_the_requests_of_another() -> None:
    """Each decides as it would alone; what all may have together is shared."""
    busy = three_stages(rate=10, seconds=(0.2, 4.0, 0.8))
    idle = three_stages(rate=0.1, seconds=(0.2, 40.0, 0.8), num_waiting=0)
    both = {f"{name}-{model}": each for model, told in (("a", busy), ("b-c", idle)) for name, each in told.items()}
    alone = {model: decide(told, target_queue_s=1e12) for model, told in (("a", busy), ("b-c", idle))}
    decided = decide(both, target_queue_s=1e12)
    assert decided == {f"{name}-{model}": count for model, each in alone.items() for name, count in each.items()}
    assert sum(decide(both, accelerators=20).values()) == 20


def test_there_are_no_more_replicas_than_requests() -> None:
    lone_video = replica("denoiser", request_s=600.0, rate=1 / 30, waiting=1)
    assert decide({"Denoiser": context(lone_video)}) == {"Denoiser": 1}
    assert decide({"Denoiser": context(lone_video, queued=2)}) == {"Denoiser": 3}


def test_one_request_after_another_needs_one_replica_of_each_stage() -> None:
    """The denoiser has the next one already when the look-back still holds the VAE's work on the one before."""
    next_one = replica("denoiser", request_s=600.0, rate=1 / 30, waiting=1)
    next_one["denoiser_present"] = series(0, 1)
    one_before = replica("vae", request_s=20.0, rate=1 / 30)
    one_before["vae_present"] = series(1, 0)
    told = {"Encoder": context(replica("encoder", request_s=0.1)), "Denoiser": context(next_one)}
    told["Encoder"].raw_metrics["encoder_present"]["replica-0"] = series(0, 0)
    assert decide(told | {"VAE": context(one_before)}) == {"Encoder": 1, "Denoiser": 1, "VAE": 1}


def test_a_replica_that_has_long_to_work_is_not_taken_away() -> None:
    four = [replica("denoiser", request_s=600.0, waiting=1) for _ in range(4)]
    assert decide({"Denoiser": context(*four, target=4)}, cooldown_s=0) == {"Denoiser": 4}
    assert decide({"Denoiser": context(*four, target=4)}, cooldown_s=0, target_queue_s=700) == {"Denoiser": 1}


def test_the_slow_first_request_of_a_new_replica_does_not_count_for_all() -> None:
    old = [replica("denoiser", request_s=10.0, rate=0.1, waiting=2) for _ in range(2)]
    new = replica("denoiser", request_s=100.0, waiting=1)
    with_new, without = ({"Denoiser": context(*each)} for each in ([*old, new], old))
    assert decide(with_new, **FOR_THE_RATE) == decide(without, **FOR_THE_RATE) == {"Denoiser": 2}


def test_the_stages_behind_grow_with_the_first_before_their_queues_do() -> None:
    told = three_stages(rate=10, seconds=(0.01, 2.0, 0.4))
    told["Denoiser"] = context(replica("denoiser", request_s=2.0, rate=0.5, waiting=16))  # the one that there is
    told["VAE"] = context(replica("vae", request_s=0.4, rate=0.5))
    decided = decide(told, **FOR_THE_RATE)
    assert decided == {"Encoder": 1, "Denoiser": 18, "VAE": 4}


def test_requests_that_the_ingress_has_no_room_for_count_as_having_come() -> None:
    told = three_stages(rate=1, seconds=(0.05, 1.0, 0.5), num_waiting=2)
    assert decide(told, **FOR_THE_RATE) == {"Encoder": 1, "Denoiser": 1, "VAE": 1}
    told["Encoder"] = context(replica("encoder", request_s=0.05, rate=1.0, refused=9.0))
    assert decide(told, **FOR_THE_RATE) == {"Encoder": 1, "Denoiser": 10, "VAE": 5}


def test_previews_are_work_of_the_vae_and_not_of_the_stages_before_it() -> None:
    told = three_stages(rate=1, seconds=(0.01, 1.0, 0.5))
    told["VAE"] = context(replica("vae", request_s=0.5, rate=4))
    assert decide(told, **FOR_THE_RATE) == {"Encoder": 1, "Denoiser": 1, "VAE": 2}


def test_the_replicas_of_a_deployment_are_taken_together() -> None:
    two = [replica("denoiser", request_s=2.0, rate=1.0, waiting=20) for _ in range(2)]
    assert decide({"Denoiser": context(*two, target=2)}, **FOR_THE_RATE) == {"Denoiser": 4}


def test_one_replica_with_all_stages_gets_the_sum_of_their_work() -> None:
    whole = {}
    for stage, seconds in zip(STAGES, (0.5, 2.0, 1.5), strict=True):
        whole |= replica(stage, request_s=seconds, rate=1.0, waiting=10)
    assert decide({"Pipeline": context(whole)}, **FOR_THE_RATE) == {"Pipeline": 4}


def test_encoder_and_vae_in_one_replica_do_not_count_a_request_twice_for_the_denoiser() -> None:
    ends = replica("encoder", request_s=0.1, rate=2.0) | replica("vae", request_s=0.4, rate=2.0)
    told = {
        "EncoderVAE": context(ends),
        "Denoiser": context(replica("denoiser", request_s=3.0, rate=0.3, waiting=10)),
    }
    assert decide(told, **FOR_THE_RATE) == {"EncoderVAE": 1, "Denoiser": 6}


def test_a_deployment_that_does_not_scale_is_left_out() -> None:
    told = three_stages(rate=1, seconds=(0.1, 4.0, 0.4))
    del told["Encoder"], told["VAE"]
    assert decide(told, **FOR_THE_RATE) == {"Denoiser": 4}


def test_each_deployments_bounds_are_kept() -> None:
    much = context(replica("denoiser", request_s=10.0, rate=10, waiting=50), bounds=(1, 7))
    nothing = context(replica("vae", request_s=0.1), bounds=(3, 9))
    assert decide({"Denoiser": much, "VAE": nothing}, cooldown_s=0) == {"Denoiser": 7, "VAE": 3}


@pytest.mark.parametrize("reported", [(), (replica("denoiser", request_s=0.0, waiting=12),)])
def test_until_a_request_is_measured_serves_own_numbers_decide(reported: tuple[dict[str, Any], ...]) -> None:
    told = {"Denoiser": context(*reported, ongoing=12)}
    assert decide(told) == {"Denoiser": 6}  # target_ongoing_requests is 2


def test_a_report_of_a_moment_is_not_taken_for_a_rate() -> None:
    young = replica("denoiser", request_s=3.0, rate=0.5, waiting=6)
    for values in young.values():
        values[0].timestamp = NOW - 1  # 15 requests in one second, 45 seconds of work
    assert decide({"Denoiser": context(young, queued=100)}, **FOR_THE_RATE) == {"Denoiser": 5}


@pytest.mark.parametrize(("num_new", "denoisers"), [(100, 16), (4, 1)])
def test_more_requests_are_seen_as_they_begin_to_come_unless_they_may_be_chance(num_new: int, denoisers: int) -> None:
    burst = replica("denoiser", request_s=2.0, waiting=num_new)
    for name, last in (("busy_s", 500 + 2 * num_new), ("arrived", 100 + num_new)):
        values = burst[f"denoiser_{name}"]
        values[1].value = last
        values.insert(1, TimeStampedValue(NOW - LOOK_BACK_S / 3, values[0].value))
    assert decide({"Denoiser": context(burst)}, **FOR_THE_RATE) == {"Denoiser": denoisers}


# --- all deployments share a number of accelerators ---


def test_what_does_not_fit_is_shared_in_the_ratio_of_the_work() -> None:
    told = three_stages(rate=10, seconds=(0.8, 8.0, 1.6), num_waiting=200)
    alone = decide(told, **FOR_THE_RATE)
    shared = decide(told, **FOR_THE_RATE, accelerators=52)
    assert alone == {"Encoder": 8, "Denoiser": 80, "VAE": 16}
    assert shared == {"Encoder": 4, "Denoiser": 40, "VAE": 8}


def test_a_stage_in_its_cooldown_gives_its_replicas_to_one_that_needs_them_now() -> None:
    peaks = {"peaks": ((NOW - 10, 9),)}
    told = {
        "Denoiser": context(replica("denoiser", request_s=0.1), target=9, state=peaks),
        "VAE": context(replica("vae", request_s=2.0, rate=4, waiting=20)),
    }
    assert decide(told, **FOR_THE_RATE) == {"Denoiser": 9, "VAE": 8}
    freed = decide(told, **FOR_THE_RATE, accelerators=10)
    assert freed == {"Denoiser": 2, "VAE": 8}


def model(name: str, rate: float, seconds: float, **told: Any) -> Told:
    """A model in one deployment, to which `rate` requests of so many seconds come."""
    return {f"Pipeline-{name}": context(replica("denoiser", request_s=seconds, rate=rate, waiting=99), **told)}


def test_replicas_are_counted_in_the_accelerators_that_they_take() -> None:
    told = model("a", 1, 20) | model("b", 1, 20)
    decided = decide(told, **FOR_THE_RATE, accelerators=12, accelerators_each={"Pipeline-b": 2})
    assert decided == {"Pipeline-a": 4, "Pipeline-b": 4}


def test_a_deployment_that_takes_no_accelerator_gets_what_it_needs() -> None:
    told = model("a", 1, 20) | model("b", 1, 20)
    decided = decide(told, **FOR_THE_RATE, accelerators=5, accelerators_each={"Pipeline-b": 0})
    assert decided == {"Pipeline-a": 5, "Pipeline-b": 20}


def test_what_is_asked_most_gets_most_and_nobody_starves() -> None:
    told = model("much", 10, 4) | model("some", 1, 4) | model("rare", 0.01, 4)
    assert decide(told, **FOR_THE_RATE, accelerators=12) == {
        "Pipeline-much": 10,
        "Pipeline-some": 1,
        "Pipeline-rare": 1,
    }


def test_a_priority_is_a_larger_share_where_the_pool_is_full_and_no_more_than_is_needed() -> None:
    told = model("a", 1, 20) | model("b", 1, 20)
    assert decide(told, **FOR_THE_RATE, accelerators=12, priorities={"a": 3}) == {"Pipeline-a": 9, "Pipeline-b": 3}
    assert decide(told, **FOR_THE_RATE, accelerators=24, priorities={"a": 9}) == {"Pipeline-a": 20, "Pipeline-b": 4}


def test_a_model_that_has_a_request_gets_each_of_its_deployments() -> None:
    told = {
        "Encoder-a": context(replica("encoder", request_s=0.1, waiting=1), bounds=(0, 4), ongoing=1),
        "Denoiser-a": context(bounds=(0, 4), target=0),
        "VAE-a": context(bounds=(0, 4), target=0),
    }
    assert decide(told, cooldown_s=0) == {"Encoder-a": 1, "Denoiser-a": 1, "VAE-a": 1}


def alternate(num_accelerators: float | None, period_s: int, run_s: int) -> tuple[int, list[int]]:
    """Starts of replicas, and those of the first model, while the load changes sides every period."""
    policy = ReplicaRatio(accelerators=num_accelerators, cooldown_s=0, **FOR_THE_RATE)
    targets, states, starts, first = {"Pipeline-a": 5, "Pipeline-b": 5}, {}, 0, []
    for second in range(0, run_s, 10):
        is_a = (second // period_s) % 2 == 0
        told: Told = {}
        for name, is_busy in (("a", is_a), ("b", not is_a)):
            key = f"Pipeline-{name}"
            told |= model(name, 9 if is_busy else 1, 1, target=targets[key], state=states.get(key), time_s=NOW + second)
            told[key].raw_metrics["load_s"] = {"replica-0": series(30.0, 30.0)}
        decided, states = policy(told)
        starts += sum(max(0, count - targets[key]) for key, count in decided.items())
        targets = decided
        first.append(decided["Pipeline-a"])
    return starts, first


def test_a_load_that_alternates_faster_than_replicas_load_moves_few_of_them() -> None:
    with_room, full = alternate(None, 30, 900)[0], alternate(9, 30, 900)[0]
    assert with_room > 200, "8 replicas 30 times"
    assert full < with_room / 8


def test_a_load_that_shifts_for_long_moves_the_replicas_within_a_few_times_of_a_load() -> None:
    _, first = alternate(9, 300, 460)
    assert first[29] == 8
    assert first[30 + 15] <= 2, "150 s after the shift"


def one_place(**told_of_b: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """Two models and one accelerator; the first has had it for ten seconds."""
    state = {"turn": Place(True, NOW - 10, True), "load_s": 30.0}
    told = model("a", 1, 1, bounds=(0, 4), state=state)
    told |= {"Pipeline-b": context(bounds=(0, 4), target=0, **told_of_b)}
    return ReplicaRatio(accelerators=1, cooldown_s=0)(told)


def test_two_models_with_one_place_take_turns_of_a_few_loads() -> None:
    waits = {"ongoing": 1, "queued": 1}
    assert one_place(**waits)[0] == {"Pipeline-a": 1}, "told none, Serve would start one of b for the call that waits"
    assert one_place(**waits, state={"turn": Place(False, NOW - 10, False)})[0]["Pipeline-a"] == 1
    long_since = {"turn": Place(True, NOW - 91, True), "load_s": 30.0}
    told = model("a", 1, 1, bounds=(0, 4), state=long_since)
    told |= {"Pipeline-b": context(bounds=(0, 4), target=0, **waits)}
    replicas, states = ReplicaRatio(accelerators=1, cooldown_s=0)(told)
    assert replicas == {"Pipeline-a": 0, "Pipeline-b": 1}
    assert states["Pipeline-b"]["turn"] == Place(True, NOW, False)


def test_a_place_is_not_taken_while_nobody_waits_for_it() -> None:
    assert one_place()[0] == {"Pipeline-a": 1, "Pipeline-b": 0}


def test_a_large_model_that_waits_is_not_overtaken_for_ever_by_small_ones() -> None:
    def small(name: str, given: bool) -> Demand:
        return Demand(name, now=1, fair=1, held=1, least=0, have=int(given))

    demands = [
        small("a", True),
        small("b", False),
        Demand("large", now=1, fair=1, held=1, least=0, have=0, accelerators=2),
    ]
    turns = {"a": Turn(True, 0, 60), "b": Turn(False, 50, 60), "large": Turn(False, 10, 60)}
    assert take_turns(2, demands, turns, now_s=59) == {"a"}, "b would let it wait longer"
    assert take_turns(2, demands, turns, now_s=60) == {"large"}


@pytest.mark.parametrize("pool", [3, 7, 20, 55.5, 1000])
def test_shares_fit_the_pool_and_nothing_that_fits_is_left_out(pool: float) -> None:
    demands = [
        Demand("a", now=7.5, fair=7.5, held=9, least=0, have=3),
        Demand("b", now=40.2, fair=44, held=60, least=1, have=30, accelerators=2, priority=2),
        Demand("c", now=0, fair=0.3, held=2, least=0, have=2, accelerators=0.5),
    ]
    shares = share(pool, demands, {"a", "b", "c"})
    assert fits(pool, demands, shares)
    assert all(low <= got <= max(each.held, 45) for low, got, each in zip((1, 1, 0), shares, demands, strict=True))
    for index, each in enumerate(demands):
        more = [count + (number == index) for number, count in enumerate(shares)]
        assert shares[index] >= each.held or not fits(pool, demands, more)


# --- when ---


def test_more_replicas_start_at_once_and_go_when_none_needed_them_for_the_cooldown() -> None:
    busy, idle = replica("denoiser", request_s=2.0, rate=2.0, waiting=10), replica("denoiser", request_s=2.0)
    policy = ReplicaRatio(cooldown_s=60, **FOR_THE_RATE)
    target, state = 1, {}
    decided = {}
    for second in range(0, 200, 5):
        reported = busy if second < 50 else idle
        told = {"Denoiser": context(reported, target=target, state=state, time_s=NOW + second)}
        replicas, states = policy(told)
        target, state = replicas["Denoiser"], states["Denoiser"]
        decided[second] = target
    assert decided[0] == 4
    assert decided[100] == 4, "last needed at 45 s"
    assert decided[105] == 1


def test_a_short_lull_takes_no_replica_away() -> None:
    policy = ReplicaRatio(cooldown_s=60, **FOR_THE_RATE)
    state: dict[str, Any] = {}
    for second in range(0, 600, 10):
        rate = 2.0 if second % 50 == 0 else 0.5
        reported = replica("denoiser", request_s=2.0, rate=rate, waiting=10)
        replicas, states = policy({"Denoiser": context(reported, target=4, state=state, time_s=NOW + second)})
        state = states["Denoiser"]
        assert replicas == {"Denoiser": 4}


def test_replicas_go_down_to_the_most_that_the_cooldown_saw_and_not_to_the_last_moment() -> None:
    state = {"peaks": ((NOW - 61, 10), (NOW - 30, 7), (NOW - 10, 3))}
    told = {"Denoiser": context(replica("denoiser", request_s=1.0), target=10, state=state)}
    assert decide(told, cooldown_s=60) == {"Denoiser": 7}


def test_what_runs_when_the_policy_is_deployed_stays_for_a_cooldown() -> None:
    told = {"Denoiser": context(replica("denoiser", request_s=1.0), target=5)}
    replicas, states = ReplicaRatio(cooldown_s=60)(told)
    assert replicas == {"Denoiser": 5}
    later = {
        "Denoiser": context(replica("denoiser", request_s=1.0), target=5, state=states["Denoiser"], time_s=NOW + 60)
    }
    assert decide(later, cooldown_s=60) == {"Denoiser": 1}


def test_a_decision_depends_on_nothing_but_what_serve_tells() -> None:
    told = three_stages(rate=10, seconds=(0.2, 4.0, 0.8))
    before = copy.deepcopy({name: each.policy_state for name, each in told.items()})
    policy = ReplicaRatio()
    first = policy(told)
    policy({"Denoiser": context(replica("denoiser", request_s=9.0, rate=9, waiting=99))})
    assert policy(told) == first == ReplicaRatio()(told)
    assert {name: each.policy_state for name, each in told.items()} == before


def test_within_a_second_of_a_decision_nothing_is_reckoned_again_and_all_is_kept() -> None:
    told = three_stages(rate=10, seconds=(0.2, 4.0, 0.8))
    policy = ReplicaRatio(accelerators=20)
    decided, states = policy(told)

    def later(seconds: float, more: int = 0) -> dict[str, AutoscalingContext]:  # the reports say nothing
        return {name: context(state=states[name], time_s=NOW + seconds, target=decided[name] + more) for name in told}

    assert policy(later(0.9)) == (decided, states)
    assert policy(later(1))[1] != states
    assert policy(later(0.9, more=1))[1] != states, "somebody else has started a replica"


# --- its settings, and how Serve gets it ---


@pytest.mark.parametrize(
    ("setting", "value", "meant"),
    [
        ("target_utilisation", 0, "target_utilisation must be a number above 0 and at most 1, got 0"),
        ("target_utilisation", 80, "at most 1, got 80"),
        ("target_queue_s", "30", "target_queue_s must be a number above 0, got '30'"),
        ("target_queue_s", float("inf"), "target_queue_s"),
        ("cooldown_s", -1, "cooldown_s"),
        ("cooldown_s", True, "cooldown_s"),
        ("accelerators", 0, "accelerators must be a number above 0, got 0"),
        ("accelerators_each", {"VAE": -1}, "accelerators_each[VAE] must be a number of at least 0, got -1"),
        ("priorities", {"flux": 0}, "priorities[flux] must be a number above 0, got 0"),
        ("accelerators_each", [1], "accelerators_each must be a mapping of names to numbers, got [1]"),
        ("accelerators", "8", "accelerators must be a number above 0, got '8'"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)^{setting}.*") as raised:
        ReplicaRatio(**{"accelerators": 8, setting: value})
    assert meant in str(raised.value)


def test_serve_makes_it_from_the_keys_of_a_config_file_without_the_project_at_hand() -> None:
    """The controller gets the class by value, in a process that may not find this project."""
    policy = AutoscalingPolicy(policy_function="serve_app.autoscaling:ReplicaRatio", policy_kwargs={"cooldown_s": 7})
    code = (
        "import sys, pickle; policy = pickle.loads(sys.stdin.buffer.read())(cooldown_s=7);"
        "print(policy.cooldown_s, policy({}), 'torch' in sys.modules, 'serve_app' in sys.modules)"
    )
    given = policy.get_serialized_policy_def()
    assert given is not None
    made = subprocess.run([sys.executable, "-P", "-c", code], input=given, capture_output=True, cwd="/", check=True)
    assert made.stdout.decode().strip() == "7 ({}, {}) False False"


def test_the_policy_knows_the_stages_and_numbers_that_the_replicas_report() -> None:
    assert STAGES == STAGES_OF_MESSAGES
    assert {each.name for each in fields(Load)} == {
        "busy_s",
        "outstanding_s",
        "request_s",
        "arrived",
        "present",
        "refused",
    }
