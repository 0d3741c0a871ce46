"""Videos and jobs of served applications over HTTP: how tests ask for them and wait for their end."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import av
import httpx
import openai
import pytest
from PIL import Image

from tests.support.served_application import ServedApplication

PROMPT = "a small cat"
WAIT_S = 600  # two cores that others use too
SMALL = {"size": "32x32", "extra_body": {"num_frames": 5, "num_inference_steps": 2, "seed": 3}}


@pytest.fixture
def client(wan: ServedApplication) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{wan.url}/wan/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(wan: ServedApplication) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{wan.url}/wan", timeout=WAIT_S) as client:
        yield client


def frames_of(video: bytes) -> list[Image.Image]:
    with av.open(io.BytesIO(video)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def wait_for_end(http: httpx.Client, job_id: str) -> dict[str, Any]:
    give_up = time.monotonic() + WAIT_S
    while True:
        answer = http.get(f"/v1/jobs/{job_id}")
        if answer.status_code == 200 and answer.json()["status"] in ("completed", "failed", "cancelled"):
            return answer.json()
        assert time.monotonic() < give_up, answer.text
        time.sleep(0.3)


def wait_for_progress(http: httpx.Client, ids: list[str]) -> None:
    """Until one of the jobs is on its way."""
    give_up = time.monotonic() + WAIT_S
    while True:
        jobs = [http.get(f"/v1/jobs/{job_id}").json() for job_id in ids]
        if any(job["progress"] > 10 for job in jobs):
            return
        assert time.monotonic() < give_up, jobs
        time.sleep(0.1)


def create(http: httpx.Client, **fields: Any) -> str:
    body = {"prompt": PROMPT, "size": "32x32", "num_frames": 5, "num_inference_steps": 2} | fields
    answer = http.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def events_of(http: httpx.Client, job_id: str, after: int = 0) -> list[tuple[int, str, dict[str, Any]]]:
    """Number, kind and data of the numbered events until the stream ends."""
    events = []
    with http.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(after)}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "id" in lines:
            events.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return events


def content_of(http: httpx.Client, video_id: str) -> bytes:
    """The file of a video that must be completed."""
    job = wait_for_end(http, video_id)
    assert job["status"] == "completed", job
    answer = http.get(f"/v1/videos/{video_id}/content")
    assert answer.status_code == 200, answer.text
    return answer.content


def picture_of_job(http: httpx.Client, job_id: str) -> bytes:
    """The file of a job that must complete."""
    job = wait_for_end(http, job_id)
    assert job["status"] == "completed", job
    [item] = job["result"]["data"]
    return http.get(item["url"]).content
