"""Arguments of the served pipeline as fields under their own names: files in every form, objects, numbers, refusals."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import pytest
from aiohttp import web

from deployments.messages import ArgumentNotes, InputImage, InputSound, ValueType
from serve_app.requests.input_pictures import PictureRules
from serve_app.requests.limits import RequestLimits
from tests.support.in_process import Server, description, picture, serving
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import video_file
from tests.support.web_server import web_server

GENERATIONS = "/v1/images/generations"
NONE, INT, FLOAT, STR, PICTURE = (ValueType(kind) for kind in ("none", "int", "float", "str", "picture"))
PICTURES = ValueType("list", (PICTURE,))
CONDITION = ValueType("record", (PICTURE, INT, FLOAT), names=("image", "frame_index", "strength"), needed=("image",))


def union(*choices: ValueType) -> ValueType:
    return ValueType("union", choices)


TYPES = {
    "control_image": union(PICTURE, ValueType("tensor"), PICTURES, NONE),
    "example_image": PICTURE,
    "reference_images": union(PICTURES, NONE),
    "pose_video": union(ValueType("video"), NONE),
    "source_audio": union(ValueType("sound"), NONE),
    "source_audios": union(ValueType("list", (ValueType("sound"),)), NONE),
    "conditions": union(ValueType("list", (CONDITION,)), NONE),
    "guess_mode": ValueType("bool"),
    "sigmas": union(ValueType("list", (FLOAT,)), NONE),
    "prompt_2": union(STR, ValueType("list", (STR,)), NONE),
    "prompt_embeds": union(ValueType("tensor"), NONE),
}
WHY = {"prompt_embeds": ArgumentNotes(why_not="only code can make its tensor")}
MODEL = description("ControlPipeline", "image", *TYPES, argument_types=TYPES, argument_notes=WHY)
RED, GREY = picture(), picture(16, 16)
AS_TEXT = base64.b64encode(RED).decode()


def sound_file(seconds: float = 0.1, rate: int = 8_000, format: str = "wav") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=format) as output:
        stream = output.add_stream("pcm_s16le", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.arange(round(seconds * rate), dtype=np.int16)[None], "s16", "mono")
        frame.sample_rate = rate
        output.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        server.configure(MODEL)
        yield server


async def made(server: Server, **asked: Any) -> dict[str, Any]:
    """The arguments that came as far as the stages."""
    answer = await server.post(GENERATIONS, **asked)
    assert answer.status_code == 200, answer.text
    return server.requests[-1].arguments


async def refused(server: Server, **asked: Any) -> dict[str, Any]:
    answer = await server.post(GENERATIONS, **asked)
    assert 400 <= answer.status_code < 500, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    "given",
    [
        AS_TEXT,
        f"data:image/png;base64,{AS_TEXT}",
        {"image_url": f"data:image/png;base64,{AS_TEXT}"},
        {"image_url": {"url": f"data:image/png;base64,{AS_TEXT}"}},
        {"data": AS_TEXT, "format": "png"},
    ],
    ids=["base64", "data URL", "image_url", "image_url object", "data"],
)
async def test_a_control_picture_is_a_field_of_json(server: Server, given: Any) -> None:
    arguments = await made(server, json={"prompt": "x", "control_image": given})
    assert arguments["control_image"] == InputImage(RED)


async def test_a_form_has_uploads_several_under_one_name_and_numbers_as_text(server: Server) -> None:
    files = [
        ("control_image", ("c.png", RED)),
        ("reference_images[]", ("a.png", RED)),
        ("reference_images[]", ("b.png", GREY)),
        ("conditions[0][image]", ("d.png", RED)),
        ("pose_video", ("p.mp4", video_file(3))),
        ("source_audio", ("s.wav", sound_file())),
    ]
    data = {"prompt": "x", "guess_mode": "true", "sigmas": ["1.0", "0.5"], "conditions[0][frame_index]": "8"}
    arguments = await made(server, data=data, files=files)
    assert arguments["control_image"] == InputImage(RED)
    assert arguments["reference_images"] == [InputImage(RED), InputImage(GREY)]
    assert arguments["conditions"] == [{"image": InputImage(RED), "frame_index": 8}]
    assert [type(frame) for frame in arguments["pose_video"]] == [InputImage] * 3
    assert arguments["source_audio"] == InputSound(sound_file())
    assert (arguments["guess_mode"], arguments["sigmas"]) == (True, [1.0, 0.5])


async def test_objects_and_lists_hold_pictures_and_null(server: Server) -> None:
    conditions = [{"image": AS_TEXT, "frame_index": 0, "strength": 0.5}, {"image": AS_TEXT}]
    asked = {"prompt": "x", "conditions": conditions, "control_image": [[AS_TEXT, None], [AS_TEXT]]}
    arguments = await made(server, json=asked)
    red = InputImage(RED)
    assert arguments["conditions"] == [{"image": red, "frame_index": 0, "strength": 0.5}, {"image": red}]
    assert (await made(server, data={"prompt": "x", "conditions": json.dumps(conditions)}))["conditions"] == [
        {"image": red, "frame_index": 0, "strength": 0.5},
        {"image": red},
    ]


async def test_a_video_may_be_a_list_of_pictures_and_pictures_may_come_as_a_video(server: Server) -> None:
    arguments = await made(server, json={"prompt": "x", "pose_video": [AS_TEXT, AS_TEXT]})
    assert arguments["pose_video"] == [InputImage(RED)] * 2
    video = base64.b64encode(video_file(4)).decode()
    assert len((await made(server, json={"prompt": "x", "reference_images": video}))["reference_images"]) == 4


async def test_an_earlier_output_is_named_by_its_file(server: Server) -> None:
    answer = await server.post(GENERATIONS, json={"prompt": "x", "response_format": "url"})
    key = httpx.URL(answer.json()["data"][0]["url"]).path
    first = await made(server, json={"prompt": "x", "control_image": {"file_id": key}})
    assert first["control_image"] == InputImage(RED)


async def test_an_earlier_output_is_named_by_its_job(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=MODEL) as (server, client):
        job = await client.post(GENERATIONS, json={"prompt": "y"}, headers={"Prefer": "respond-async"})
        await ended(client, job.json()["id"])
        arguments = await made(server, json={"prompt": "x", "control_image": {"id": job.json()["id"]}})
        other = await refused(server, json={"prompt": "x", "control_image": {"id": job.json()["id"], "index": 1}})
    assert arguments["control_image"] == InputImage(RED)
    assert (other["param"], "has 1 files" in other["message"]) == ("control_image", True)


async def test_a_file_at_a_url_is_fetched_whatever_it_is(server: Server) -> None:
    async def sound(_: web.Request) -> web.Response:
        return web.Response(body=sound_file())

    server.configure(MODEL, pictures=PictureRules(RequestLimits(), True, True))
    async with web_server(sound) as url:
        arguments = await made(server, json={"prompt": "x", "source_audio": url})
    assert arguments["source_audio"] == InputSound(sound_file())


WAVE_TAG = slice(20, 22)  # of the codec, in the head of a WAV file


def foreign_sound() -> bytes:
    """Of a codec that nobody knows."""
    data = bytearray(sound_file())
    data[WAVE_TAG] = b"\x34\x12"
    return bytes(data)


SOUND_AS_TEXT = base64.b64encode(sound_file()).decode()
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"control_imag": AS_TEXT}, "control_imag", "did you mean 'control_image'"),
    ({"prompt_embeds": [1.0]}, "prompt_embeds", "only code can make its tensor"),
    ({"control_image": "/etc/passwd"}, "control_image", "must be a PNG"),
    ({"control_image": "https://example.com/x.png"}, "control_image", "not fetched"),
    ({"control_image": {"id": "image_none"}}, "control_image", "there is no job"),
    ({"control_image": {"file_id": "../../etc/passwd"}}, "control_image", "there is no file"),
    ({"control_image": 5}, "control_image", "must be a picture"),
    ({"example_image": [AS_TEXT, AS_TEXT]}, "example_image", r"must be a picture, got \[a picture, a picture\]"),
    ({"reference_images": [AS_TEXT] * 17}, "reference_images", "at most 16 files"),
    ({"source_audio": AS_TEXT}, "source_audio", "must be a WAV"),
    ({"source_audio": base64.b64encode(foreign_sound()).decode()}, "source_audio", "cannot be read"),
    ({"source_audio": [SOUND_AS_TEXT] * 2}, "source_audio", r"must be a sound or null, got \[a sound, a sound\]"),
    ({"image": [[AS_TEXT] * 9] * 2}, "image", "at most 16 pictures, got 18"),
    ({"source_audio": base64.b64encode(sound_file(1.0)).decode()}, "source_audio", "at most 0.5 seconds"),
    ({"source_audios": [base64.b64encode(sound_file(0.3)).decode()] * 2}, "source_audios", "at most 0.5 seconds"),
    ({"pose_video": base64.b64encode(video_file(5)[:-400]).decode()}, "pose_video", "pose_video"),
    ({"conditions": [{"frame_index": 1}]}, "conditions", "an object with image"),
    ({"conditions": [{"image": AS_TEXT, "index": 1}]}, "conditions", "an object with image"),
    ({"guess_mode": "perhaps"}, "guess_mode", "true or false"),
    ({"prompt_2": "a\0b"}, "prompt_2", "NUL"),
    ({"control_image": [[[[[[[[[[AS_TEXT]]]]]]]]]]}, "control_image", "8 deep"),
]


async def test_what_an_argument_cannot_be_is_refused_by_its_name(server: Server) -> None:
    server.configure(MODEL, limits={"max_sound_s": 0.5})
    for fields, param, says in REFUSED:
        error = await refused(server, json={"prompt": "x"} | fields)
        assert (error["param"], bool(re.search(says, error["message"]))) == (param, True), error["message"]
    assert server.requests == []


async def test_a_file_in_an_object_of_plain_values_is_refused_by_its_name(server: Server) -> None:
    plain = ValueType("dict", (ValueType("any"),))
    server.configure(description("ControlPipeline", "attention_kwargs", argument_types={"attention_kwargs": plain}))
    error = await refused(server, data={"prompt": "x"}, files={"attention_kwargs[scale]": ("a.bin", b"\0\1")})
    assert (error["param"], error["message"]) == (
        "attention_kwargs",
        "attention_kwargs must be an object, got {'scale': a file}",
    )


async def test_a_file_that_the_pipeline_cannot_do_without_is_asked_for_by_name(server: Server) -> None:
    server.configure(description("ControlPipeline", *TYPES, argument_types=TYPES, required=("control_image",)))
    error = await refused(server, json={"prompt": "x"})
    assert (error["param"], error["code"]) == ("control_image", "missing_required_parameter")


async def test_the_fields_of_the_model_are_in_the_openapi_document(server: Server) -> None:
    async with server.client() as client:
        document = (await client.get("/openapi.json")).json()
    fields = document["components"]["schemas"]["ImageGenerationBody"]["properties"]
    condition = next(each for each in fields["conditions"]["anyOf"] if each["type"] == "array")["items"]
    assert (condition["required"], condition["properties"]["frame_index"]) == (["image"], {"type": "integer"})
    assert "prompt_embeds" not in fields
    form = document["paths"][GENERATIONS]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"type": "string", "format": "binary"} in form["properties"]["control_image"]["anyOf"]
