"""Videos and jobs of a served model over HTTP: OpenAI's client, replicas and an S3 server that are killed."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import httpx
import openai
import psutil
import pytest
from PIL import Image

from tests.s3_server import S3Server, s3_server
from tests.serve_app.served_application import ServedApplication, application, error_of
from tests.tiny_models import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # OpenAI's own videos end; the client says so
]

BUCKET = "videos"
PROMPT = "a small cat"
WAIT_S = 240
SMALL = {"size": "32x32", "extra_body": {"num_frames": 5, "num_inference_steps": 2, "seed": 3}}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def wan(served: ServedApplication, checkpoints_root: Path, s3: S3Server) -> Iterator[ServedApplication]:
    """A tiny Wan 2.2 in one stage that stores in S3, at /wan."""
    app = application(
        "wan",
        checkpoint("wan22", checkpoints_root),
        ("Pipeline",),
        served.folder,
        placement="one_stage",
        url_style="path",
        jobs={"lease_s": 5},
    )
    settings = {"ENDPOINT_URL": s3.endpoint, "ACCESS_KEY_ID": s3.access_key, "SECRET_ACCESS_KEY": s3.secret_key}
    variables = {f"SGLANG_S3_{name}": value for name, value in settings.items()}
    variables |= {"SGLANG_S3_BUCKET_NAME": BUCKET, "SGLANG_CLOUD_STORAGE_TYPE": "s3"}
    app["runtime_env"]["env_vars"] |= variables
    with served.beside(app):
        served.wait_until_healthy("/wan")
        yield served


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


# --- OpenAI's client ---


def test_the_openai_client_makes_polls_downloads_and_deletes_a_video(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(model="wan", prompt=PROMPT, seconds="1", **SMALL | {"extra_body": {"fps": 5, "seed": 3, "num_inference_steps": 2}})
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "32x32", "1")
    content = client.videos.download_content(video.id).read()
    assert len(frames_of(content)) == 5
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError) as error:
        client.videos.retrieve(video.id)
    assert error.value.code == "video_not_found"
