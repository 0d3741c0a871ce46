"""The shortest of these tests: Ray's own autoscaler, the real ingress, and stages that load no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.autoscaled_cluster import HEAD, PLACE, AutoscaledCluster, autoscaled_cluster
from tests.support.cluster_load import Caller, load, undisturbed
from tests.support.served_application import PLAIN

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("default")]

ON_HEAD = {"ray_actor_options": {"num_cpus": 0.1, "resources": {HEAD: 0.01}}, "graceful_shutdown_timeout_s": 2}
DENOISER = "Denoiser-toy"
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "Ingress": ON_HEAD,
    "Encoder-toy": ON_HEAD,
    "VAE-toy": ON_HEAD,
    DENOISER: {
        "ray_actor_options": {"num_cpus": 0.1, "resources": {PLACE: 1}},
        "graceful_shutdown_timeout_s": 2,
        "autoscaling_config": {
            "min_replicas": 0, "initial_replicas": 0, "max_replicas": 1, "metrics_interval_s": 1,
            "look_back_period_s": 3, "upscale_delay_s": 0, "downscale_delay_s": 0, "target_ongoing_requests": 100,
        },
    },
}  # fmt: skip
POLICY = {"policy_function": "serve_app.autoscaling:ReplicaRatio", "policy_kwargs": {"idle_s": 5}}
CALLERS = (Caller("job", "toy", 1), Caller("call", "toy", 2))


def test_a_node_comes_with_the_first_request_is_lost_with_work_on_it_and_another_goes_with_the_last(
    tmp_path: Path,
) -> None:
    entry = {
        "import_path": "tests.support.sleeping_toy:build_app",
        "runtime_env": PLAIN,
        "args": {"output_directory": str(tmp_path / "outputs"), "request_s": 1.0},
    }
    with autoscaled_cluster(entry, idle_minutes=0.1) as cluster:
        cluster.deploy({}, DEPLOYMENTS, POLICY)
        cluster.wait_until_served(DEPLOYMENTS)
        assert cluster.nodes() == set()
        truths = undisturbed(cluster.url, CALLERS)
        with load(cluster.url, CALLERS) as work:
            cluster.wait_until("an answer", lambda: len(work.outcomes) >= 1)
            [first] = cluster.nodes()
            cluster.lose(first)
            ended = len(work.outcomes)
            cluster.wait_until("answers from another node", lambda: has_other(cluster, first, work.outcomes, ended))
        assert work.lost() == []
        assert work.differing(truths) == []
        cluster.wait_until("no node", lambda: cluster.nodes() == set())


def has_other(cluster: AutoscaledCluster, first: str, outcomes: list[Any], ended: int) -> bool:
    return len(outcomes) >= ended + 2 and bool(cluster.nodes() - {first})
