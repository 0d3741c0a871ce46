"""One cluster for all: two models behind one endpoint, a denoiser on each node that the autoscaler brings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.autoscaled_cluster import AutoscaledCluster, autoscaled_cluster
from tests.support.cluster_load import Caller, undisturbed
from tests.support.two_models_on_a_cluster import ALTERNATE_S, CALLERS, DEPLOYMENTS, POLICY, TWO_MODELS, stores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alternate-s", type=float, default=ALTERNATE_S, help="seconds in which two models take turns")


@pytest.fixture(scope="session")
def empty_cluster() -> Iterator[AutoscaledCluster]:
    with stores() as entry, autoscaled_cluster(entry) as cluster:
        yield cluster


@pytest.fixture
def cluster(empty_cluster: AutoscaledCluster) -> AutoscaledCluster:
    """With both models as they are at first, whatever an earlier test deployed."""
    empty_cluster.deploy(TWO_MODELS, DEPLOYMENTS, POLICY)
    empty_cluster.wait_until_served(DEPLOYMENTS)
    return empty_cluster


@pytest.fixture(scope="session")
def kept_truths() -> dict[Caller, str]:
    return {}


@pytest.fixture
def truths(cluster: AutoscaledCluster, kept_truths: dict[Caller, str]) -> dict[Caller, str]:
    """What each caller gets from the undisturbed cluster, asked once; then only one node and denoiser are left."""
    if not kept_truths:
        kept_truths.update(undisturbed(cluster.url, CALLERS))
    cluster.wait_until("one denoiser", lambda: len(cluster.nodes()) == len(cluster.replicas("Denoiser-flux")) == 1)
    return kept_truths


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Figures, printed at the end of the test, also when it fails."""
    figures: list[str] = []
    yield figures
    with capsys.disabled():
        print("\n" + "\n".join(figures))
