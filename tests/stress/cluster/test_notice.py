"""A node is drained with notice, as spot instances are: its work moves or is resumed, and no request fails."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace

import pytest

from tests.support.autoscaled_cluster import AutoscaledCluster
from tests.support.cluster_load import Caller, each_once, load, undisturbed
from tests.support.two_models_on_a_cluster import CALLERS

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("default")]

DENOISER = "Denoiser-flux"
NOTICE_S = 30
MOST_STEPS = 1000  # that the model's limits allow


def test_a_drained_node_costs_no_request_and_no_byte(
    cluster: AutoscaledCluster, truths: dict[Caller, str], say: list[str]
) -> None:
    longer = longer_than_the_notice(cluster)
    truths = truths | undisturbed(cluster.url, [longer])
    [replica] = cluster.running(DENOISER)
    log = len(cluster.logs("Ingress"))
    with load(cluster.url, [*CALLERS, longer]) as work:
        cluster.wait_until("requests that end", lambda: len(work.outcomes) >= 2)
        noticed = time.monotonic()
        cluster.give_notice(replica.node_id, NOTICE_S)
        told = len(work.outcomes)

        def has_moved() -> bool:
            return any(each.node_id != replica.node_id for each in cluster.running(DENOISER))

        left_s = cluster.wait_until(
            "a migration", lambda: replica.pid not in [each.pid for each in cluster.running(DENOISER)]
        )
        say.append(f"Serve moves the denoiser: {left_s:.0f} s after the notice was given")
        time.sleep(max(0.0, NOTICE_S - (time.monotonic() - noticed)))
        ended = len(work.outcomes)
        say.append(f"{ended - told} requests ended within the notice of {NOTICE_S} s")
        cluster.lose(replica.node_id)
        cluster.wait_until("a denoiser elsewhere", has_moved)
        say.append(f"a denoiser runs elsewhere: {time.monotonic() - noticed:.0f} s after the notice")
        cluster.wait_until("work goes on", lambda: len(work.outcomes) >= ended + 2)
    again = [int(steps) for steps in re.findall(r"\((\d+) steps? lost\)", cluster.logs("Ingress")[log:])]
    say.append(f"{len(again)} times a request went on elsewhere from its checkpoint, {sum(again)} steps again")
    say.append(
        f"{len(work.outcomes)} requests, {len(work.lost())} failed, {len(work.differing(truths))} with other bytes, "
        f"{time.monotonic() - noticed:.0f} s in all"
    )
    assert work.lost() == []
    assert work.differing(truths) == []


def longer_than_the_notice(cluster: AutoscaledCluster) -> Caller:
    """A job that takes twice the notice, alone on a denoiser of this machine."""
    probe = Caller("job", "flux", 21, steps=40)
    [told] = each_once(cluster.url, [probe])
    return replace(probe, steps=min(MOST_STEPS, math.ceil(probe.steps * 2 * NOTICE_S / told.seconds)))
