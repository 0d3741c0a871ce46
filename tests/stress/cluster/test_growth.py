"""Load rises, nodes come, replicas start there; a node dies; load falls, nodes go: nothing is lost, no byte differs."""

from __future__ import annotations

import time

import pytest

from tests.support.autoscaled_cluster import MOST_NODES, AutoscaledCluster
from tests.support.cluster_load import Caller, load
from tests.support.two_models_on_a_cluster import CALLERS

pytestmark = [pytest.mark.timeout(2400), pytest.mark.filterwarnings("default")]

DENOISER = "Denoiser-flux"


def test_nodes_come_and_go_with_the_load_and_one_dies_meanwhile(
    cluster: AutoscaledCluster, truths: dict[Caller, str], say: list[str]
) -> None:
    began = time.monotonic()
    say.append(f"at first: {len(cluster.nodes())} node, {len(cluster.running(DENOISER))} denoiser")

    def has_grown() -> bool:
        nodes = cluster.nodes()
        running = {each.node_id for each in cluster.running(DENOISER)}
        return len(nodes) == MOST_NODES and running >= nodes

    with load(cluster.url, CALLERS) as work:
        say.append(
            f"{MOST_NODES} nodes, a denoiser on each: after {cluster.wait_until('grown', has_grown):.0f} s of load"
        )
        lost = sorted(cluster.nodes())[0]
        cluster.lose(lost)
        again_s = cluster.wait_until("grown again", lambda: lost not in cluster.nodes() and has_grown())
        say.append(f"a node lost; again {MOST_NODES} nodes, a denoiser on each: after {again_s:.0f} s")
    gone_s = cluster.wait_until("shrunk", lambda: len(cluster.nodes()) == 1 and len(cluster.running(DENOISER)) == 1)
    say.append(f"1 node, 1 denoiser: {gone_s:.0f} s after the last request")
    say.append(
        f"{len(work.outcomes)} requests, {len(work.lost())} lost, {len(work.differing(truths))} with other bytes, "
        f"{time.monotonic() - began:.0f} s in all"
    )
    assert work.lost() == []
    assert work.differing(truths) == []
    assert {each.caller for each in work.outcomes} == set(CALLERS)
