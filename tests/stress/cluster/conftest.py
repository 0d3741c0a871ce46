"""One cluster for all: two models behind one endpoint, a denoiser on each node that the autoscaler brings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.autoscaled_cluster import TWO_MODELS, AutoscaledCluster, autoscaled_cluster
from tests.support.cluster_load import Caller, undisturbed
from tests.support.two_models_on_a_cluster import ALTERNATE_S, CALLERS, DEPLOYMENTS, POLICY


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
