"""Two models and one place for one denoiser: requests take turns, each finishes, and what loading costs is counted."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from tests.support.autoscaled_cluster import AutoscaledCluster
from tests.support.cluster_load import Caller, each_once
from tests.support.two_models_on_a_cluster import ALTERNATE_S, ON_HEAD, TWO_MODELS

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("default")]

MODELS = ("first", "second")
FEWEST_SWITCHES = 2  # however long they take
IN_TURNS: dict[str, Any] = {
    "ray_actor_options": {"num_cpus": 0.1, "resources": {"denoiser": 1}},  # of which the cluster has one
    "autoscaling_config": {
        "min_replicas": 0, "max_replicas": 1, "initial_replicas": 0, "upscale_delay_s": 0, "downscale_delay_s": 0,
        "metrics_interval_s": 1, "look_back_period_s": 5,
    },
}  # fmt: skip
ONE_FOR_ALL = {
    "policy_function": "serve_app.autoscaling:ReplicaRatio",
    "policy_kwargs": {"accelerators": 1, "idle_s": 600},
}


def test_two_models_take_turns_at_one_place(
    empty_cluster: AutoscaledCluster, request: pytest.FixtureRequest, say: list[str]
) -> None:
    cluster, seconds = empty_cluster, request.config.getoption("--alternate-s", ALTERNATE_S)
    flux = TWO_MODELS["models"]["flux"]
    deployments = (
        {"Ingress": {"ray_actor_options": ON_HEAD}}
        | {f"EncoderVAE-{model}": {"ray_actor_options": ON_HEAD} for model in MODELS}
        | {f"Denoiser-{model}": IN_TURNS for model in MODELS}
    )
    cluster.deploy(TWO_MODELS | {"models": dict.fromkeys(MODELS, flux)}, deployments, ONE_FOR_ALL)
    cluster.wait_until_served(deployments)
    began, waiting_s, outcomes = time.monotonic(), [], []
    for turn, model in zip(itertools.count(), itertools.cycle(MODELS)):
        if time.monotonic() - began > seconds and turn > FEWEST_SWITCHES:
            break
        # The first of a turn is always the same one. The second finds the denoiser loaded.
        [cold] = each_once(cluster.url, [Caller("job", model, 1)])
        [warm] = each_once(cluster.url, [Caller("call", model, turn)])
        outcomes += [cold, warm]
        waiting_s.append(cold.seconds - warm.seconds)
    in_all_s = time.monotonic() - began
    lost = [each for each in outcomes if each.digest is None]
    made = {(each.caller.model, each.digest) for each in outcomes[::2]}  # a file names its model
    say.append(
        f"{len(outcomes)} requests in {in_all_s:.0f} s, {len(lost)} lost, {len(waiting_s) - 1} switches, "
        f"{len(made) - len(MODELS)} with other bytes"
    )
    shortest, longest = min(waiting_s[1:]), max(waiting_s[1:])
    say.append(f"a switch took {shortest:.0f} to {longest:.0f} s, {sum(waiting_s) / in_all_s:.0%} of the time")
    both = each_once(cluster.url, [Caller("job", model, 1) for model in MODELS])
    say.append(f"asked at the same time: both done after {max(each.seconds for each in both):.0f} s")
    assert lost == []
    assert len(made) == len(MODELS)
    assert made == {(each.caller.model, each.digest) for each in both}
