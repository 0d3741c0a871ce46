"""The head is lost with all that the cluster knew: a new one is deployed, and the jobs of before go on in it."""

from __future__ import annotations

import time

import pytest

from tests.support.autoscaled_cluster import AutoscaledCluster
from tests.support.cluster_load import Caller, load
from tests.support.two_models_on_a_cluster import CALLERS, DEPLOYMENTS, POLICY, TWO_MODELS

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("default")]

JOBS = [caller for caller in CALLERS if caller.kind == "job"]


def test_jobs_outlive_the_head(cluster: AutoscaledCluster, truths: dict[Caller, str], say: list[str]) -> None:
    with load(cluster.url, JOBS) as work:
        cluster.wait_until("a request that ends", lambda: len(work.outcomes) >= 1)
        time.sleep(3)  # the next ones are at work
        lost = time.monotonic()
        cluster.lose_all()
        cluster.start_again()
        cluster.deploy(TWO_MODELS, DEPLOYMENTS, POLICY)
        ended = len(work.outcomes)
        cluster.wait_until_served(DEPLOYMENTS)
        say.append(f"a new head serves {time.monotonic() - lost:.0f} s after the old one was lost")
        cluster.wait_until("work goes on", lambda: len(work.outcomes) >= ended + len(JOBS))
    say.append(
        f"{len(work.outcomes)} jobs, {len(JOBS)} of them at work at the loss, {len(work.lost())} lost, "
        f"{len(work.differing(truths))} with other bytes"
    )
    assert work.lost() == []
    assert work.differing(truths) == []
