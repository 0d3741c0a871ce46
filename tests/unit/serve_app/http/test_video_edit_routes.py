"""Videos from videos in this process: what reaches the stages, what is refused, and files that mean harm."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import av
import diffusers
import httpx
import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.messages import GenerationRequest, InputImage, Media, StageDescription
from serve_app.http.routes.video_edits import EDITING, EXTENDING, check_edit, check_extension
from serve_app.jobs import runner
from serve_app.requests.edit_bodies import VideoEditBody, VideoExtensionBody
from serve_app.requests.input_videos import read_video
from serve_app.requests.limits import RequestLimits
from tests.support.in_process import Server, description, picture
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import make_video, video_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI's own videos end; the client says so

EDITS, EXTENSIONS = "/v1/videos/edits", "/v1/videos/extensions"
EDITOR = description("WanVideoToVideoPipeline", "video", "strength", media_kind="video", tasks=("video_to_video",))
FROM_A_PICTURE = description(
    "WanImageToVideoPipeline", "image", "num_frames", media_kind="video", tasks=("image_to_video",)
)
FROM_TEXT = description("WanPipeline", "num_frames", media_kind="video", tasks=("text_to_video",))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)


def brightness(image: InputImage) -> int:
    return round(np.asarray(Image.open(io.BytesIO(image.data))).mean())


async def made_from(server: Server, client: httpx.AsyncClient, answer: httpx.Response) -> GenerationRequest:
    """The request that came as far as the stages."""
    assert answer.status_code == 200, answer.text
    assert (await ended(client, answer.json()["id"]))["status"] == "completed"
    return next(each for each in server.requests if each.request_id == answer.json()["id"])


# --- what the models are given ---


async def test_an_edit_gives_the_model_every_frame_and_the_size_and_rate_of_the_video(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=EDITOR) as (server, client):
        server.make = make_video
        answer = await client.post(
            EDITS, data={"prompt": "at night", "strength": "0.7"}, files={"video": ("x.mp4", video_file(5, 50, 40))}
        )
        made = await made_from(server, client, answer)
    frames = made.arguments["video"]
    assert [brightness(frame) for frame in frames] == pytest.approx([0, 40, 80, 120, 160], abs=3)
    assert (made.arguments["width"], made.arguments["height"]) == (48, 32)  # the model's multiples of 16
    assert (made.arguments["strength"], made.output.fps) == (0.7, 8.0)


async def test_what_the_caller_says_of_size_and_rate_counts_more_than_the_video(tmp_path: Path) -> None:
    body = {"prompt": "x", "size": "64x64", "fps": 4, "video": base64.b64encode(video_file()).decode()}
    async with server_with_jobs(tmp_path, describing=EDITOR) as (server, client):
        server.make = make_video
        made = await made_from(server, client, await client.post(EDITS, json=body))
    assert (made.arguments["width"], made.arguments["height"], made.output.fps) == (64, 64, 4.0)


async def test_a_model_that_asks_for_the_number_of_frames_is_told_that_of_the_video(tmp_path: Path) -> None:
    vace = description("WanVACEPipeline", "video", "num_frames", media_kind="video", tasks=("video_to_video",))
    async with server_with_jobs(tmp_path, describing=vace) as (server, client):
        server.make = make_video
        answer = await client.post(EDITS, data={"prompt": "x"}, files={"video": video_file(5)})
        assert (await made_from(server, client, answer)).arguments["num_frames"] == 5


async def test_an_extension_begins_with_the_last_frame_and_is_as_long_as_asked(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=FROM_A_PICTURE) as (server, client):
        server.make = make_video
        answer = await client.post(
            EXTENSIONS,
            data={"prompt": "on", "seconds": "2"},
            files={"video": video_file(5, container="webm", codec="libvpx-vp9")},
        )
        made = await made_from(server, client, answer)
    assert brightness(made.arguments["image"]) == pytest.approx(160, abs=3)
    assert (made.arguments["num_frames"], made.output.fps) == (16, 8.0)
    assert "video" not in made.arguments


async def test_a_video_that_was_made_here_is_meant_by_its_id(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=FROM_A_PICTURE) as (server, client):
        server.make = make_video
        first = await client.post("/v1/videos", json={"prompt": "x"})
        await made_from(server, client, first)
        source = {"id": first.json()["id"]}
        by_json = await client.post(EXTENSIONS, json={"prompt": "on", "seconds": 1, "video": source})
        by_form = await client.post(EXTENSIONS, data={"prompt": "on", "seconds": "1", "video[id]": source["id"]})
        for answer in (by_json, by_form):
            made = await made_from(server, client, answer)
            assert brightness(made.arguments["image"]) == pytest.approx(80, abs=3)
            assert answer.json()["remixed_from_video_id"] == source["id"]
        unknown = await client.post(EXTENSIONS, json={"prompt": "on", "video": {"id": "video_none"}})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "video_not_found")


async def test_the_openai_client_edits_and_extends(tmp_path: Path) -> None:
    tasks = ("text_to_video", "image_to_video", "video_to_video")
    both = description("LTXConditionPipeline", "video", "image", "num_frames", media_kind="video", tasks=tasks)
    async with server_with_jobs(tmp_path, describing=both) as (server, _):
        http = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(server))
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)
        server.make = make_video
        edited = await client.videos.edit(prompt="at night", video=("x.mp4", video_file()))
        extended = await client.videos.extend(prompt="on", seconds="4", video=("x.mp4", video_file()))
        assert [(await client.videos.poll(each.id)).status for each in (edited, extended)] == ["completed"] * 2
        with pytest.raises(openai.BadRequestError, match="characters are not supported"):
            await client.videos.create_character(name="Anna", video=video_file())
        with pytest.raises(openai.BadRequestError, match="characters are not supported"):
            await client.videos.get_character("character_1")


async def test_the_same_key_and_video_give_the_same_job_and_another_video_a_conflict(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=EDITOR) as (server, client):
        server.make = make_video
        answers = [
            await client.post(EDITS, data={"prompt": "x"}, files={"video": video}, headers={"Idempotency-Key": "k"})
            for video in (video_file(), video_file(), video_file(4))
        ]
    assert answers[0].json()["id"] == answers[1].json()["id"]
    assert (answers[2].status_code, answers[2].json()["error"]["code"]) == (409, "idempotency_conflict")


# --- what is refused ---


@pytest.mark.parametrize(("route", "families"), [(EDITS, EDITING), (EXTENSIONS, EXTENDING)])
async def test_a_model_that_cannot_says_which_can(tmp_path: Path, route: str, families: str) -> None:
    async with server_with_jobs(tmp_path, describing=FROM_TEXT) as (_, client):
        answer = await client.post(route, data={"prompt": "x"}, files={"video": video_file()})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "not_supported", "video")
    assert error["message"].startswith("WanPipeline ")
    assert families in error["message"]


@pytest.mark.parametrize(("families", "argument"), [(EDITING, "video"), (EXTENDING, "image")])
def test_the_families_that_are_named_do_take_it(families: str, argument: str) -> None:
    for name in families.replace(" or ", ", ").split(", "):
        assert argument in getattr(diffusers, name).__call__.__annotations__, name


@pytest.mark.parametrize(
    ("route", "fields", "param", "says"),
    [
        (EDITS, {}, "video", "video is required"),
        (EDITS, {"video": "aGVsbG8="}, "video", "must be an MP4, WebM or MOV file"),
        (EDITS, {"video": "https://example.com/x.mp4"}, "video", "must be an MP4, WebM or MOV file"),
        (EDITS, {"video": {"name": "x"}}, "video", "must be an MP4, WebM or MOV file"),
        (EDITS, {"video": None}, "video", "video is required"),
        (EDITS, {"video": "FILE", "seconds": 4}, "seconds", "as long as its video"),
        (EDITS, {"video": "FILE", "response_format": "b64_json"}, "response_format", "not supported"),
        (EDITS, {"video": "FILE", "prompt": ""}, "prompt", "required"),
        (EXTENSIONS, {"video": "FILE", "image": "FILE"}, "image", "PNG, JPEG, WebP"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path, route: str, fields: dict[str, Any], param: str, says: str
) -> None:
    tasks = ("text_to_video", "image_to_video", "video_to_video")
    both = description("LTXConditionPipeline", "video", "image", "num_frames", media_kind="video", tasks=tasks)
    file = base64.b64encode(video_file()).decode()
    body = {"prompt": "x"} | {name: file if value == "FILE" else value for name, value in fields.items()}
    async with server_with_jobs(tmp_path, describing=both) as (_, client):
        answer = await client.post(route, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]


@pytest.mark.parametrize(
    ("kind", "check", "describing", "field", "value"),
    [
        (VideoEditBody, check_edit, EDITOR, "seconds", 4),
        (VideoEditBody, check_edit, EDITOR, "num_frames", 9),
        (VideoExtensionBody, check_extension, FROM_A_PICTURE, "image", base64.b64encode(picture()).decode()),
    ],
)
def test_without_strict_a_field_that_the_video_decides_is_dropped_and_named(
    kind: Any, check: Any, describing: StageDescription, field: str, value: Any
) -> None:
    video = base64.b64encode(video_file()).decode()
    body = kind.model_validate({"prompt": "x", "video": video, "strict": False, field: value})
    check(body, describing)
    assert getattr(body, field) is None
    assert [(each.code, each.param) for each in body.warnings] == [("no_effect", field)]


async def test_a_video_that_is_not_made_yet_cannot_be_extended(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=FROM_A_PICTURE) as (server, client):

        async def fail(_: GenerationRequest) -> Media:
            raise InvalidRequestError("no", "prompt")

        server.make = fail
        first = await client.post("/v1/videos", json={"prompt": "x"})
        await ended(client, first.json()["id"])
        answer = await client.post(EXTENSIONS, json={"prompt": "x", "video": {"id": first.json()["id"]}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_not_ready")


# --- files that mean harm ---


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_frames": 4}, "at most 4 frames"),
        ({"max_input_pixels": 48 * 32 - 1}, "at most 1535 pixels"),
    ],
)
def test_a_video_above_a_limit_is_refused_with_the_limit(limits: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as refused:
        read_video(video_file(5), RequestLimits(**limits))
    assert refused.value.code == "limit_exceeded"


def test_all_frames_together_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.requests.input_videos.MAX_TOTAL_PIXELS", 48 * 32 * 3)
    with pytest.raises(InvalidRequestError, match="width x height x frames"):
        read_video(video_file(5), RequestLimits())


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_file_that_is_cut_off_is_refused_in_a_sentence(part: float) -> None:
    data = video_file(5)
    with pytest.raises(InvalidRequestError, match=r"an MP4, WebM or MOV file, .* complete"):
        read_video(data[: int(len(data) * part)], RequestLimits())


def test_a_play_list_is_not_followed_whatever_it_begins_with(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(video_file())
    play_list = f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.mp4\n".encode()
    for data in (b"\0\0\0\x18ftyp" + play_list, b"\x1aE\xdf\xa3" + play_list):
        with pytest.raises(InvalidRequestError, match=r"an MP4, WebM or MOV file, .* complete"):
            read_video(data, RequestLimits())


def test_damaged_files_are_refused_or_read_and_nothing_else() -> None:
    data, random = video_file(5), np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.integers(8, len(data), 6):
            damaged[place] = random.integers(256)
        try:
            assert read_video(bytes(damaged), RequestLimits()).frames
        except InvalidRequestError as refused:
            assert refused.param == "video"  # noqa: PT017


def test_a_file_with_sound_alone_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(InvalidRequestError):
        read_video(file.getvalue(), RequestLimits())
