"""`serve deploy` of one model's next checkpoint under load of both: the other's replicas stay, and no request fails.

The next checkpoint has another encoder and the same transformer: what the earlier encoder made must not go on in the
new denoiser, whose checkpoints look alike.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest

from tests.support.autoscaled_cluster import AutoscaledCluster
from tests.support.cluster_load import Caller, load, undisturbed
from tests.support.two_models_on_a_cluster import CALLERS, DEPLOYMENTS, POLICY, TWO_MODELS, next_version

pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("default")]

OF_FLUX, OF_BOTH = ("EncoderVAE-flux", "Denoiser-flux"), "Ingress"


def test_an_update_of_one_model_leaves_the_other_alone_and_mixes_no_versions(
    cluster: AutoscaledCluster, truths: dict[Caller, str], tmp_path: Path, say: list[str]
) -> None:
    before = {name: {each.pid for each in cluster.replicas(name)} for name in (*OF_FLUX, OF_BOTH, "Pipeline-wan")}
    args = copy.deepcopy(TWO_MODELS)
    args["models"]["flux"]["model"] = str(next_version(args["models"]["flux"]["model"], tmp_path / "next"))

    def is_replaced(deployment: str) -> bool:
        running = cluster.running(deployment)
        return bool(running) and not {each.pid for each in cluster.replicas(deployment)} & before[deployment]

    with load(cluster.url, CALLERS) as work:
        cluster.wait_until("requests that end", lambda: len(work.outcomes) >= 2)
        began = time.monotonic()
        cluster.deploy(args, DEPLOYMENTS, POLICY)
        cluster.wait_until("replaced", lambda: all(map(is_replaced, (*OF_FLUX, OF_BOTH))))
        say.append(f"encoder, denoiser and ingress replaced under load: {time.monotonic() - began:.0f} s")
        ended = len(work.outcomes)
        cluster.wait_until("work goes on", lambda: len(work.outcomes) >= ended + 2)
    later = undisturbed(cluster.url, CALLERS)
    changed = [caller for caller in CALLERS if later[caller] != truths[caller]]
    of_earlier = sum(each.digest == truths[each.caller] for each in work.outcomes if each.caller in changed)
    say.append(
        f"{len(work.outcomes)} requests, {len(work.lost())} failed, {of_earlier} of the updated model as before and "
        f"{len(work.differing(truths, later))} as neither version makes them"
    )
    assert work.lost() == []
    assert work.differing(truths, later) == []
    assert {caller.model for caller in changed} == {"flux"}
    assert {each.pid for each in cluster.replicas("Pipeline-wan")} == before["Pipeline-wan"]
