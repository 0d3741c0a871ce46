"""One cluster for all: two models behind one endpoint, a denoiser on each node that the autoscaler brings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.autoscaled_cluster import HEAD, MOST_NODES, PLACE, TWO_MODELS, AutoscaledCluster, autoscaled_cluster
from tests.support.cluster_load import Caller, undisturbed

ALTERNATE_S = 300
ON_HEAD = {"num_cpus": 0.1, "resources": {HEAD: 0.01}}
POLICY = {
    "policy_function": "serve_app.autoscaling:ReplicaRatio",
    "policy_kwargs": {"target_queue_s": 5, "cooldown_s": 15},
}
GROWS = {"min_replicas": 1, "max_replicas": MOST_NODES, "upscale_delay_s": 0, "downscale_delay_s": 0}
DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "Ingress": {"ray_actor_options": ON_HEAD},
    "EncoderVAE-flux": {"ray_actor_options": ON_HEAD},
    "Pipeline-wan": {"ray_actor_options": ON_HEAD},
    "Denoiser-flux": {
        "ray_actor_options": {"num_cpus": 0.1, "resources": {PLACE: 1}},
        "max_ongoing_requests": 3,
        "autoscaling_config": GROWS,
    },
}
CALLERS = (
    *(Caller("job", "flux", seed) for seed in range(1, 4)),
    *(Caller("call", "flux", seed) for seed in range(11, 13)),
    Caller("job", "wan", 1),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alternate-s", type=float, default=ALTERNATE_S, help="seconds in which two models take turns")


@pytest.fixture(scope="session")
def empty_cluster() -> Iterator[AutoscaledCluster]:
    with autoscaled_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="package")
def cluster(empty_cluster: AutoscaledCluster) -> AutoscaledCluster:
    empty_cluster.deploy(TWO_MODELS, DEPLOYMENTS, POLICY)
    empty_cluster.wait_until_healthy()
    return empty_cluster


@pytest.fixture(scope="package")
def truths(cluster: AutoscaledCluster) -> dict[Caller, str]:
    """What each caller gets from the undisturbed cluster."""
    return undisturbed(cluster.url, CALLERS)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Figures, printed at the end of the test, also when it fails."""
    figures: list[str] = []
    yield figures
    with capsys.disabled():
        print("\n" + "\n".join(figures))
