"""Jobs outlive the replicas that work on them, and the end of everything: twenty at a time."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.support.served_application import THREE_STAGE, ServedApplication, launched_application
from tests.support.tiny_models import checkpoint
from tests.support.video_jobs import PROMPT, WAIT_S, content_of, create, picture_of_job, wait_for_progress

pytestmark = pytest.mark.timeout(1500)


@pytest.mark.parametrize("killed", [("Ingress",), ("Ingress", *THREE_STAGE)], ids=["the ingress", "every replica"])
def test_every_job_completes_with_the_same_bytes_when_replicas_are_killed(
    wan: ServedApplication, http: httpx.Client, killed: tuple[str, ...]
) -> None:
    seeds = range(20)
    settings = {"num_inference_steps": 60, "deterministic": True}
    ids = [create(http, seed=seed, **settings) for seed in seeds]
    wait_for_progress(http, ids)
    for process in [wan.process_of(deployment, "wan") for deployment in killed]:
        process.kill()
    wan.wait_until_healthy("/wan")
    survivors = [content_of(http, video_id) for video_id in ids]
    undisturbed = [content_of(http, twin) for twin in [create(http, seed=seed, **settings) for seed in seeds]]
    assert survivors == undisturbed
    assert len(set(survivors)) == len(ids)


def test_jobs_outlive_the_end_of_everything_and_complete_after_a_restart(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    flux = checkpoint("flux", checkpoints_root)
    seeds = range(20)
    with launched_application(flux, tmp_path) as first, httpx.Client(base_url=first.url, timeout=WAIT_S) as http:
        ids = [create_picture(http, seed) for seed in seeds]
        wait_for_progress(http, ids)
        assert not all(http.get(f"/v1/jobs/{job_id}").json()["status"] == "completed" for job_id in ids)
        for process in first.processes():
            process.kill()
        first.launcher.wait()
    with launched_application(flux, tmp_path) as second, httpx.Client(base_url=second.url, timeout=WAIT_S) as http:
        survivors = [picture_of_job(http, job_id) for job_id in ids]
        undisturbed = [picture_of_job(http, twin) for twin in [create_picture(http, seed) for seed in seeds]]
    assert survivors == undisturbed
    assert len(set(survivors)) == len(ids)


def create_picture(http: httpx.Client, seed: int) -> str:
    """A job that takes a while; its id."""
    body = {"prompt": PROMPT, "num_inference_steps": 150, "deterministic": True, "background": True, "seed": seed}
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]
