"""POST /v1/audio/generations and /v1/tensors/generations: what reaches the pipeline, what comes back."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from deployments.messages import GenerationRequest, Media, MediaFile, StageDescription, ValueType
from serve_app.storage.base import CONTENT_TYPES
from tests.support.in_process import Server, description, serving

ROUTES = {"image": "/v1/images/generations", "audio": "/v1/audio/generations", "tensors": "/v1/tensors/generations"}
ROUTES["video"] = "/v1/videos/generations"
NAMES = {"image": "images", "video": "videos", "audio": "sound", "tensors": "tensors"}


def sounding(pipeline_class: str, *parameters: str, **changes: Any) -> StageDescription:
    described = description(pipeline_class, *parameters, media_kind="audio", **changes)
    kept = {n: d for n, d in described.parameters.items() if n not in ("width", "height")}
    return StageDescription(**vars(described) | {"parameters": kept})


STABLE_AUDIO = sounding("StableAudioPipeline", "audio_start_in_s", "audio_end_in_s")


async def make_sound(request: GenerationRequest) -> Media:
    mime_type = CONTENT_TYPES[request.output.format]
    if request.output.kind == "tensors":
        return Media((MediaFile(b"numbers", mime_type),))
    file = MediaFile(b"RIFF sound", mime_type, sample_rate=16_000, channels=2, num_samples=40_000)
    return Media((file,), {"decode": 0.5}, num_steps=4)


@pytest.fixture
def server(tmp_path: Path):
    with serving(tmp_path / "outputs") as server:
        server.make = make_sound
        yield server


async def test_a_sound_comes_with_its_length_rate_and_channels(server: Server) -> None:
    server.configure(STABLE_AUDIO)
    answer = await server.post(ROUTES["audio"], json={"prompt": "rain", "seed": 3, "n": 2, "output_format": "flac"})
    made = answer.json()
    assert answer.status_code == 200
    assert [base64.b64decode(item["b64_json"]) for item in made["data"]] == [b"RIFF sound"] * 2
    assert [item["seed"] for item in made["data"]] == [3, 4]
    told = {name: made[name] for name in ("output_format", "seconds", "sample_rate", "channels", "steps")}
    assert told == {"output_format": "flac", "seconds": 2.5, "sample_rate": 16_000, "channels": 2, "steps": [4, 4]}
    assert "size" not in made


@pytest.mark.parametrize(
    ("format", "content_type"), [("wav", "audio/wav"), ("flac", "audio/flac"), ("mp3", "audio/mpeg")]
)
async def test_a_stored_sound_is_served_with_its_type_and_in_ranges(
    server: Server, format: str, content_type: str
) -> None:
    server.configure(STABLE_AUDIO)
    body = {"prompt": "rain", "response_format": "url", "output_format": format}
    [item] = (await server.post(ROUTES["audio"], json=body)).json()["data"]
    assert item["url"].endswith(f".{format}")
    async with server.client() as client:
        whole = await client.get(item["url"])
        part = await client.get(item["url"], headers={"Range": "bytes=0-3"})
    assert (whole.content, whole.headers["content-type"]) == (b"RIFF sound", content_type)
    assert (part.status_code, part.content) == (206, b"RIFF")


@pytest.mark.parametrize(
    ("own", "fields", "arguments"),
    [
        ("audio_end_in_s", {"seconds": 5}, {"audio_end_in_s": 5.0}),
        ("audio_length_in_s", {"duration": 2.5}, {"audio_length_in_s": 2.5}),
        ("audio_duration", {"seconds": 5}, {"audio_duration": 5.0}),
        ("audio_duration_s", {"seconds": 5}, {"audio_duration_s": 5.0}),
        ("duration", {"duration": 5}, {"duration": 5.0}),
    ],
)
async def test_the_length_reaches_the_pipeline_under_its_own_name(
    server: Server, own: str, fields: dict[str, Any], arguments: dict[str, Any]
) -> None:
    server.configure(sounding("SoundPipeline", own))
    assert (await server.post(ROUTES["audio"], json={"prompt": "rain"} | fields)).status_code == 200
    assert server.requests[-1].arguments.items() >= arguments.items()


async def test_a_sound_that_begins_later_ends_as_much_later(server: Server) -> None:
    server.configure(STABLE_AUDIO)
    body = {"prompt": "rain", "seconds": 4, "extra_args": {"audio_start_in_s": 1.5}}
    assert (await server.post(ROUTES["audio"], json=body)).status_code == 200
    assert server.requests[-1].arguments["audio_end_in_s"] == 5.5


async def test_a_sound_whose_start_is_null_begins_at_its_beginning(server: Server) -> None:
    number = ValueType("union", (ValueType("float"), ValueType("none")))
    described = sounding("StableAudioPipeline", "audio_start_in_s", "audio_end_in_s")
    named = {
        "parameters": described.parameters | {"audio_start_in_s": 0.0},
        "argument_types": {"audio_start_in_s": number},
    }
    server.configure(StageDescription(**vars(described) | named))
    body = {"prompt": "rain", "seconds": 4, "extra_args": {"audio_start_in_s": None}}
    assert (await server.post(ROUTES["audio"], json=body)).status_code == 200
    assert server.requests[-1].arguments["audio_end_in_s"] == 4


@pytest.mark.parametrize(
    ("described", "fields", "param", "says"),
    [
        (STABLE_AUDIO, {"seconds": 601}, "seconds", "at most 600"),
        (STABLE_AUDIO, {"extra_args": {"audio_end_in_s": 601}}, "audio_end_in_s", "at most 600"),
        (STABLE_AUDIO, {"seconds": 3, "extra_args": {"audio_end_in_s": 3}}, "seconds", "not both"),
        (STABLE_AUDIO, {"seconds": 3, "audio_end_in_s": 3}, "seconds", "not both"),
        (STABLE_AUDIO, {"size": "64x64"}, "size", "does not take it"),
        (STABLE_AUDIO, {"output_format": "ogg"}, "output_format", "wav"),
        (STABLE_AUDIO, {"prompt": ""}, "prompt", "required"),
        (sounding("MelodyPipeline"), {"seconds": 3}, "seconds", "no argument for the length"),
    ],
)
async def test_what_a_sound_cannot_be_asked_for_is_refused_by_name(
    server: Server, described: StageDescription, fields: dict[str, Any], param: str, says: str
) -> None:
    server.configure(described)
    answer = await server.post(ROUTES["audio"], json={"prompt": "rain"} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]


async def test_a_model_without_words_needs_none(server: Server) -> None:
    described = sounding("DanceDiffusionPipeline", "audio_length_in_s")
    server.configure(StageDescription(**vars(described) | {"parameters": {"audio_length_in_s": None}}))
    assert (await server.post(ROUTES["audio"], json={"seconds": 1})).status_code == 200


@pytest.mark.parametrize("made", ROUTES)
@pytest.mark.parametrize("asked", ROUTES)
async def test_a_body_for_another_kind_of_model_is_told_what_it_makes_and_where(
    server: Server, made: str, asked: str
) -> None:
    if made == asked:
        return
    server.configure(description("APipeline", media_kind=made))
    answer = await server.post(ROUTES[asked], json={"prompt": "a fox"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "model")
    assert f"makes {NAMES[made]}" in error["message"]
    assert ROUTES[made].removesuffix("/generations") in error["message"]


async def test_an_edit_sent_to_a_model_of_sound_is_told_the_route(server: Server) -> None:
    server.configure(STABLE_AUDIO)
    answer = await server.post("/v1/images/edits", json={"prompt": "rain"})
    assert answer.status_code == 400
    assert "makes sound" in answer.json()["error"]["message"]


async def test_tensors_come_as_one_file(server: Server) -> None:
    server.configure(description("KandinskyPriorPipeline", media_kind="tensors"))
    answer = await server.post(ROUTES["tensors"], json={"prompt": "a fox", "response_format": "url"})
    [item] = answer.json()["data"]
    assert item["url"].endswith(".safetensors")
    async with server.client() as client:
        assert (await client.get(item["url"])).content == b"numbers"


@pytest.mark.parametrize(
    ("described", "told"),
    [
        (STABLE_AUDIO, {"kind": "audio", "seconds": 2.5, "sample_rate": 16_000, "channels": 2}),
        (description("KandinskyPriorPipeline", media_kind="tensors"), {"kind": "tensors"}),
    ],
)
async def test_a_job_makes_what_the_route_would_have_answered(
    server: Server, described: StageDescription, told: dict[str, Any]
) -> None:
    server.configure(described)
    await server.open()
    server.service.start()
    route = ROUTES[described.media_kind]
    async with server.client() as client:
        begun = await client.post(route, json={"prompt": "rain", "seed": 1}, headers={"Prefer": "respond-async"})
        job = (await client.get(begun.headers["Location"], headers={"Prefer": "wait=30"})).json()
    assert (begun.status_code, job["status"], job["kind"]) == (202, "completed", told["kind"])
    assert {name: job["result"].get(name) for name in told if name != "kind"} == {
        name: value for name, value in told.items() if name != "kind"
    }
    assert job["id"].startswith(told["kind"])
    assert job["result"]["data"][0]["url"]


async def test_the_same_key_finds_the_sound_that_was_made(server: Server) -> None:
    server.configure(STABLE_AUDIO)
    await server.open()
    server.service.start()
    answers = [
        await server.post(ROUTES["audio"], json={"prompt": "rain"}, headers={"Idempotency-Key": "k"}) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert len(server.requests) == 1
