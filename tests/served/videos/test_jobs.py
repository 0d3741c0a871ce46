"""Videos and jobs of a served model over HTTP: OpenAI's client, and an S3 server that is killed."""

from __future__ import annotations

import base64
import io
import time
import uuid
from contextlib import closing

import httpx
import numpy as np
import openai
import pytest
from botocore.exceptions import ClientError
from PIL import Image

from tests.support.s3_server import S3Server
from tests.support.served_application import ServedApplication, error_of, picture_of
from tests.support.served_fixtures import BUCKET
from tests.support.video_jobs import (
    PROMPT,
    SMALL,
    WAIT_S,
    create,
    events_of,
    frames_of,
    wait_for_end,
)

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # OpenAI's own videos end; the client says so
]


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
    kinds = [kind for _, kind, _ in events if kind != "warning"]  # a busy machine tells what it has not checked
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
        wan.process_of("Ingress", "wan").kill()  # what waits in the spool outlives it, and it starts without S3
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
