"""A device dies under a request, on a real Ray: its replica is replaced, and the request goes on to the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.dying_device import DIES_AT, plugin_in
from tests.support.served_application import PLAIN, ROOT, THREE_STAGE, ServedApplication, application
from tests.support.video_jobs import PROMPT, WAIT_S, picture_of_job, wait_for_progress

pytestmark = pytest.mark.timeout(900)

DIED = re.compile(r"a replica died .* going on from step (\d+)")


def dying(served: ServedApplication, checkpoint: Path, dies_at: Path) -> dict[str, Any]:
    """In three stages, the denoiser on a device of its own."""
    config = application("dying", checkpoint, THREE_STAGE, served.folder, denoising={"checkpoint_every": 1})
    [denoiser] = [each for each in config["deployments"] if each["name"] == "Denoiser"]
    variables = {
        "PYTHONPATH": f"{plugin_in(dies_at.parent / 'plugin')}:{ROOT}",
        "SGLANG_DIFFUSION_TARGET_DEVICE": "npu",
        DIES_AT: str(dies_at),
    }
    denoiser["ray_actor_options"] |= {"resources": {"NPU": 0.5}, "runtime_env": PLAIN | {"env_vars": variables}}
    return config


def ask(http: httpx.Client) -> str:
    body = {"prompt": PROMPT, "num_inference_steps": 100, "deterministic": True, "background": True, "seed": 3}
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def test_a_device_that_dies_in_the_middle_of_a_request_costs_a_replica_and_no_byte(
    served: ServedApplication, flux_checkpoint: Path, tmp_path: Path
) -> None:
    dies_at = tmp_path / "dies"
    with (
        served.beside(dying(served, flux_checkpoint, dies_at)),
        httpx.Client(base_url=f"{served.url}/dying", timeout=WAIT_S) as http,
    ):
        served.wait_until_healthy("/dying")
        undisturbed = picture_of_job(http, ask(http))
        died = served.process_of("Denoiser", "dying")
        job_id = ask(http)
        wait_for_progress(http, [job_id])
        dies_at.touch()
        assert picture_of_job(http, job_id) == undisturbed
        assert not dies_at.exists()
        assert served.process_of("Denoiser", "dying").pid != died.pid
        [step] = [int(step) for step in DIED.findall(served.log())][:1]
        assert step > 0
