"""Videos and jobs of a served model over HTTP: OpenAI's client, replicas and an S3 server that are killed."""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import psutil
import pytest
from botocore.exceptions import ClientError
from PIL import Image

from tests.support.s3_server import S3Server, s3_server
from tests.support.served_application import (
    ServedApplication,
    application,
    error_of,
    picture_of,
    serve_run,
)
from tests.support.tiny_models import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # OpenAI's own videos end; the client says so
]

BUCKET = "videos"
PROMPT = "a small cat"
WAIT_S = 600  # two cores that others use too
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


# --- OpenAI's client ---


def test_the_openai_client_makes_polls_downloads_and_deletes_a_video(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(
        prompt=PROMPT, size="32x32", seconds="1", extra_body={"fps": 5, "seed": 3, "num_inference_steps": 2}
    )
    assert (video.status, video.progress, video.size, video.seconds) == ("completed", 100, "32x32", "1")
    content = client.videos.download_content(video.id).read()
    assert len(frames_of(content)) == 5
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError) as error:
        client.videos.retrieve(video.id)
    assert error.value.code == "video_not_found"


def test_the_openai_client_lists_its_videos_page_by_page(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=PROMPT, **SMALL).id for _ in range(3)]
    listed = [video.id for video in client.videos.list(limit=2, order="asc")]
    assert listed[-3:] == made
    assert [video.id for video in client.videos.list(limit=2)][:3] == made[::-1]
    first = client.videos.list(limit=1)
    assert (first.has_more, first.last_id) == (True, made[-1])


def test_a_thumbnail_and_a_sheet_show_the_videos_frames(client: openai.OpenAI, http: httpx.Client) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, **SMALL)
    frames = frames_of(client.videos.download_content(video.id).read())
    thumbnail = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read()))
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").read()))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", frames[0].size)
    difference = np.abs(np.asarray(thumbnail.convert("RGB"), float) - np.asarray(frames[0], float)).mean()
    assert difference < np.abs(np.asarray(thumbnail.convert("RGB"), float) - np.asarray(frames[-1], float)).mean()
    assert (sheet.format, sheet.size) == ("JPEG", (4 * 160, 2 * 160))  # 5 frames of 32 x 32


def test_a_part_of_a_video_can_be_asked_for(client: openai.OpenAI, http: httpx.Client) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, **SMALL)
    path = f"/v1/videos/{video.id}/content"
    whole = http.get(path)
    part = http.get(path, headers={"Range": "bytes=10-19"})
    end = http.get(path, headers={"Range": "bytes=-5"})
    beyond = http.get(path, headers={"Range": f"bytes={len(whole.content)}-"})
    assert (whole.status_code, whole.headers["accept-ranges"]) == (200, "bytes")
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert (end.status_code, end.content) == (206, whole.content[-5:])
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(whole.content)}")


def test_a_remix_has_the_parameters_of_the_first_video_and_a_prompt_of_its_own(client: openai.OpenAI) -> None:
    first = client.videos.create_and_poll(prompt=PROMPT, **SMALL)
    remix = client.videos.remix(first.id, prompt="a small dog")
    assert (remix.remixed_from_video_id, remix.prompt, remix.size) == (first.id, "a small dog", first.size)
    remix = client.videos.poll(remix.id)
    twin = client.videos.create_and_poll(prompt="a small dog", **SMALL)
    contents = [client.videos.download_content(video.id).read() for video in (first, remix, twin)]
    assert contents[1] == contents[2] != contents[0]


def test_the_client_is_told_when_to_ask_again_and_progress_never_falls(http: httpx.Client) -> None:
    video_id = create(http, num_inference_steps=40)
    seen = []
    while True:
        answer = http.get(f"/v1/videos/{video_id}")
        seen.append((answer.json()["status"], answer.json()["progress"]))
        if seen[-1][0] == "completed":
            break
        assert 1 <= int(answer.headers["openai-poll-after-ms"]) <= 10_000
    progress = [percent for _, percent in seen]
    assert progress == sorted(progress)
    assert [percent == 100 for percent in progress] == [status == "completed" for status, _ in seen]


def test_a_video_that_is_not_ready_has_no_content(http: httpx.Client) -> None:
    video_id = create(http, num_inference_steps=500)
    answer = http.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "video_not_ready")
    assert http.delete(f"/v1/videos/{video_id}").status_code == 200


# --- any request as a job ---


def test_a_picture_in_the_background_is_a_job_with_the_synchronous_picture(served: ServedApplication) -> None:
    with httpx.Client(base_url=served.url, timeout=WAIT_S) as http:
        body = {"prompt": PROMPT, "seed": 5, "n": 2}
        answer = http.post("/v1/images/generations", json=body | {"background": True})
        assert (answer.status_code, answer.headers["preference-applied"]) == (202, "respond-async")
        job = wait_for_end(http, answer.json()["id"])
        urls = [item["url"] for item in job["result"]["data"]]
        made = [http.get(url).content for url in urls]
        direct = http.post("/v1/images/generations", json=body).json()["data"]
    assert [item["seed"] for item in job["result"]["data"]] == [5, 6]
    assert made == [base64.b64decode(item["b64_json"]) for item in direct]


def test_events_of_a_job_can_be_read_again_from_any_of_them(http: httpx.Client) -> None:
    video_id = create(http, num_inference_steps=20)
    events = events_of(http, video_id)
    kinds = [kind for _, kind, _ in events]
    assert [kinds[0], kinds[1], kinds[-2], kinds[-1]] == ["queued", "in_progress", "stored", "completed"]
    assert "step" in kinds
    assert events_of(http, video_id, after=events[1][0]) == events[2:]


def test_a_cancelled_job_stops_and_frees_its_place(http: httpx.Client) -> None:
    video_id = create(http, num_inference_steps=1000)
    while http.get(f"/v1/videos/{video_id}").json()["progress"] == 0:
        time.sleep(0.2)
    assert http.post(f"/v1/jobs/{video_id}/cancel").json()["status"] == "cancelled"
    video = http.get(f"/v1/videos/{video_id}").json()
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    assert wait_for_end(http, create(http))["status"] == "completed"


def test_a_retry_with_the_same_key_gets_the_same_answer(served: ServedApplication) -> None:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    body = {"prompt": PROMPT}  # without a seed: another generation would make another picture
    with httpx.Client(base_url=served.url, timeout=WAIT_S) as http:
        first = http.post("/v1/images/generations", json=body, headers=key)
        again = http.post("/v1/images/generations", json=body, headers=key)
        other = http.post("/v1/images/generations", json=body | {"n": 2}, headers=key)
    assert first.status_code == 200, first.text
    assert first.json() == again.json()
    assert picture_of(first.json()["data"][0]).size == (32, 32)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_conflict")


def test_the_same_key_and_form_give_the_same_video(client: openai.OpenAI) -> None:
    header = {"Idempotency-Key": uuid.uuid4().hex}
    first, again = (client.videos.create(prompt=PROMPT, **SMALL, extra_headers=header) for _ in range(2))
    assert first.id == again.id


# --- what dies ---


def ingress_of(served: ServedApplication) -> psutil.Process:
    return served.process_of("Ingress", "wan")


@pytest.mark.stress
@pytest.mark.parametrize("killed", [("Ingress",), ("Ingress", "Pipeline")], ids=["the ingress", "every replica"])
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


def content_of(http: httpx.Client, video_id: str) -> bytes:
    """The file of a video that must be completed."""
    job = wait_for_end(http, video_id)
    assert job["status"] == "completed", job
    answer = http.get(f"/v1/videos/{video_id}/content")
    assert answer.status_code == 200, answer.text
    return answer.content


def test_an_output_is_kept_and_uploaded_when_s3_is_killed_and_comes_back(
    wan: ServedApplication, http: httpx.Client, s3: S3Server
) -> None:
    s3.kill()
    try:
        job = wait_for_end(http, create(http, seed=11))
        assert (job["status"], job["upload"]) == ("completed", "pending")
        served = http.get(f"/v1/videos/{job['id']}/content").content
        assert len(frames_of(served)) == 5
        body = {"prompt": PROMPT, "size": "32x32", "num_frames": 5, "num_inference_steps": 2, "seed": 11}
        direct = http.post("/v1/videos/generations", json=body | {"response_format": "b64_json"})
        assert direct.status_code == 200, direct.text
        assert base64.b64decode(direct.json()["data"][0]["b64_json"]) == served
        ingress_of(wan).kill()  # what waits in the spool outlives it, and it starts without S3
        wan.wait_until_healthy("/wan")
        assert http.get(f"/v1/videos/{job['id']}/content").content == served
    finally:
        s3.start()
    give_up = time.monotonic() + WAIT_S
    while http.get(f"/v1/jobs/{job['id']}").json()["upload"] != "done":
        assert time.monotonic() < give_up, wan.log()[-5000:]
        time.sleep(0.5)
    [key] = [url.partition("/v1/files/")[2] for url in http.get(f"/v1/videos/{job['id']}").json()["urls"]]
    with closing(s3.client()) as bucket:
        stored = bucket.get_object(Bucket=BUCKET, Key=key)
        assert stored["Body"].read() == served
        assert stored["ContentType"] == "video/mp4"
        assert http.delete(f"/v1/videos/{job['id']}").status_code == 200
        with pytest.raises(ClientError, match="NoSuchKey"):
            bucket.get_object(Bucket=BUCKET, Key=key)


@pytest.mark.stress
def test_jobs_outlive_the_end_of_everything_and_complete_after_a_restart(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    flux = checkpoint("flux", checkpoints_root)
    seeds = range(20)
    with serve_run(flux, tmp_path) as first, httpx.Client(base_url=first.url, timeout=WAIT_S) as http:
        ids = [create_picture(http, seed) for seed in seeds]
        wait_for_progress(http, ids)
        assert not all(http.get(f"/v1/jobs/{job_id}").json()["status"] == "completed" for job_id in ids)
        for process in first.processes():
            process.kill()
        first.serve_run.wait()
    with serve_run(flux, tmp_path) as second, httpx.Client(base_url=second.url, timeout=WAIT_S) as http:
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


def picture_of_job(http: httpx.Client, job_id: str) -> bytes:
    """The file of a job that must complete."""
    job = wait_for_end(http, job_id)
    assert job["status"] == "completed", job
    [item] = job["result"]["data"]
    return http.get(item["url"]).content
