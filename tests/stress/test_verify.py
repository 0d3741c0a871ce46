"""`verify: true` on a real Ray: a split that is right starts, one that is not says so and serves nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.planted_mismatch import fault_in
from tests.support.served_application import ONE_STAGE, ROOT, START_TIMEOUT_S, ServedApplication, application

pytestmark = pytest.mark.timeout(900)


def verified(name: str, served: ServedApplication, checkpoint: Path, **variables: str) -> dict[str, Any]:
    config = application(name, checkpoint, ONE_STAGE, served.folder, variables, placement="one_stage", verify=True)
    config["deployments"] = [{**each, "max_constructor_retry_count": 1} for each in config["deployments"]]
    return config


def test_an_application_starts_only_where_the_split_makes_what_the_unsplit_pipeline_makes(
    served: ServedApplication, flux_checkpoint: Path, tmp_path: Path
) -> None:
    wrong = verified("wrong", served, flux_checkpoint, PYTHONPATH=f"{fault_in(tmp_path / 'fault')}:{ROOT}")
    with served.beside(verified("verified", served, flux_checkpoint), wrong):
        served.wait_until_healthy("/verified")
        asked = {"prompt": "a small cat", "seed": 3, "deterministic": True}
        [checked], [other] = served.pictures("/verified", **asked), served.pictures(**asked)
        assert checked["b64_json"] == other["b64_json"]
        give_up = time.monotonic() + START_TIMEOUT_S
        while (status := served.status()["wrong"])["status"] != "DEPLOY_FAILED":
            assert time.monotonic() < give_up, status
            time.sleep(0.5)
        message = status["deployments"]["Pipeline"]["message"]
        assert "verify: " in message
        assert "elements differ by at most" in message
        assert served.health("/wrong").status_code != 200
    assert "verify: flux is held against the unsplit pipeline" in served.log()
