"""Edits and streamed pictures as the OpenAI client asks for them, up to the door of the stages."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai.types import ImageEditCompletedEvent, ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from deployments.errors import GenerationFailedError
from deployments.messages import InputImage
from serve_app.http.streaming import PartialPictures, picture_events
from tests.support.in_process import Server, description, picture, serving

EDITS = "/v1/images/edits"
GENERATIONS = "/v1/images/generations"
INPAINT = description("FluxInpaintPipeline", "image", "mask_image", "strength", tasks=("inpainting",))
KONTEXT = description("FluxKontextPipeline", "image", tasks=("text_to_image", "image_to_image"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


def openai_client(server) -> openai.AsyncOpenAI:
    transport = httpx2.ASGITransport(server)
    return openai.AsyncOpenAI(
        base_url="http://test/v1",
        api_key="none",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(transport=transport),
    )


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- edits ---


async def test_the_openai_client_edits_a_picture_with_a_mask(server):
    server.configure(INPAINT)
    image, mask = picture(48, 32), picture(48, 32, "webp")
    answer = await openai_client(server).images.edit(
        image=("../../etc/passwd.png", image),
        mask=("mask.webp", mask),
        prompt="a hat",
        size="48x32",
        n=2,
        output_format="jpeg",
        extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.5},
    )
    assert [Image.open(io.BytesIO(base64.b64decode(item.b64_json))).format for item in answer.data] == ["JPEG"] * 2
    assert [request.seed for request in server.requests] == [7, 8]
    assert server.requests[0].arguments == {
        "prompt": "a hat",
        "image": InputImage(image),
        "mask_image": InputImage(mask),
        "width": 48,
        "height": 32,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
    }


async def test_several_uploads_come_in_their_order(server):
    server.configure(KONTEXT)
    pictures = [picture(16 * n, 16) for n in (1, 2, 3)]
    await openai_client(server).images.edit(image=pictures, prompt="all of them")
    assert server.requests[0].arguments["image"] == [InputImage(data) for data in pictures]


async def test_nested_arguments_survive_the_form(server):
    server.configure(description("FluxKontextPipeline", "image", "eta", "sigmas"))
    await openai_client(server).images.edit(
        image=picture(), prompt="x", extra_body={"extra_args": {"eta": 0.5}, "negative_prompt": "{not json}"}
    )
    arguments = server.requests[0].arguments
    assert (arguments["eta"], arguments["negative_prompt"]) == (0.5, "{not json}")


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: base64.b64encode(data).decode(),
        lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
        lambda data: [{"image_url": "data:image/png;base64," + base64.b64encode(data).decode()}],
    ],
    ids=["base64", "data URL", "list of objects"],
)
async def test_an_edit_may_come_as_json(server, name, wrap):
    server.configure(KONTEXT)
    answer = await server.post(EDITS, json={"prompt": "x", name: wrap(picture())})
    assert answer.status_code == 200
    assert server.requests[0].arguments["image"] == InputImage(picture())


@pytest.mark.parametrize(
    ("describing", "form", "param", "code"),
    [
        (KONTEXT, {"mask": True}, "mask", "not_supported"),
        (description("FluxPipeline"), {}, "image", "not_supported"),
        (KONTEXT, {"size": "33x32"}, "size", "invalid_value"),
        (KONTEXT, {"markup": "x"}, "markup", "invalid_value"),
        (KONTEXT, {"stepz": "3"}, "stepz", "unknown_parameter"),
        (KONTEXT, {"n": "two"}, "n", "invalid_value"),
        (KONTEXT, {"image": None}, "image", "missing_required_parameter"),
    ],
)
async def test_an_edit_that_cannot_be_made_is_refused_by_the_field(server, describing, form, param, code):
    server.configure(describing)
    files = {"image": ("a.png", picture())}
    if form.pop("mask", False):
        files["mask"] = ("m.png", picture())
    if "image" in form:
        files = {"other": ("", b"")}
        form = {}
        answer = await server.post(EDITS, data={"prompt": "x"}, files=None)
    else:
        answer = await server.post(EDITS, data={"prompt": "x", **form}, files=files)
    assert (answer.status_code, error_of(answer)["param"], error_of(answer)["code"]) == (400, param, code)
    assert param in error_of(answer)["message"]
    assert server.requests == []


async def test_an_upload_that_is_no_picture_is_refused(server):
    server.configure(KONTEXT)
    answer = await server.post(EDITS, data={"prompt": "x"}, files={"image": ("a.png", b"GIF89a....")})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "image")


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"{bad", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"no boundary", "multipart/form-data", 400),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x", 400),
        (b"prompt", "text/plain", 415),
    ],
)
async def test_a_broken_body_is_refused_in_openais_shape(server, content, content_type, status):
    answer = await server.post(EDITS, content=content, headers={"content-type": content_type})
    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"
    assert error_of(answer)["code"]


@pytest.mark.parametrize(
    "describing",
    [
        description("WanStuffPipeline", "image", required=("image",), tasks=("image_to_image",)),
        description("FluxImg2ImgPipeline", "image", tasks=("image_to_image",)),
    ],
    ids=["no default", "by its name"],
)
async def test_a_model_that_starts_from_a_picture_sends_generations_to_edits(server, describing):
    server.configure(describing)
    answer = await server.post(GENERATIONS, json={"prompt": "x"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "image")
    assert EDITS in error_of(answer)["message"]
    again = await server.post(EDITS, json={"prompt": "x", "image": base64.b64encode(picture()).decode()})
    assert again.status_code == 200


# --- streamed ---


async def test_the_openai_client_streams_a_generation(server):
    stream = await openai_client(server).images.generate(prompt="x", stream=True, n=2, extra_body={"seed": 3})
    events = [event async for event in stream]
    assert [type(event) for event in events] == [ImageGenCompletedEvent] * 2
    for event in events:
        ImageGenCompletedEvent.model_validate(event.model_dump())
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (32, 32)
    assert sorted(event.seed for event in events) == [3, 4]


async def test_the_openai_client_gets_partial_pictures_before_the_picture(server):
    stream = await openai_client(server).images.generate(prompt="x", size="32x32", stream=True, partial_images=2)
    events = [event async for event in stream]
    *partials, completed = events
    assert [type(event) for event in partials] == [ImageGenPartialImageEvent] * 2
    for event in partials:
        ImageGenPartialImageEvent.model_validate(event.model_dump())
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (32, 32)
    assert [event.partial_image_index for event in partials] == [0, 1]
    assert isinstance(completed, ImageGenCompletedEvent)


async def test_partial_pictures_are_named_in_warnings_where_there_is_no_stream_to_send_them_in(server):
    answer = await server.post(GENERATIONS, json={"prompt": "x", "partial_images": 1})
    assert answer.status_code == 200
    [warning] = answer.json()["warnings"]
    assert warning["param"] == "partial_images"
    assert "stream: true" in warning["message"]


async def test_a_stream_holds_the_pictures_whatever_form_was_asked_for(server):
    stream = await openai_client(server).images.generate(prompt="x", response_format="url", stream=True)
    [event] = [event async for event in stream]
    assert event.b64_json
    [warning] = event.model_extra["warnings"]
    assert warning["param"] == "response_format"


async def test_the_openai_client_streams_an_edit(server):
    server.configure(KONTEXT)
    stream = await openai_client(server).images.edit(image=picture(), prompt="x", stream=True)
    [event] = [event async for event in stream]
    assert isinstance(event, ImageEditCompletedEvent)
    ImageEditCompletedEvent.model_validate(event.model_dump())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"partial_images": 4}, "partial_images"),
        ({"size": "33x32"}, "size"),
    ],
)
async def test_what_cannot_be_streamed_is_refused_before_the_stream_begins(server, body, param):
    answer = await server.post(GENERATIONS, json={"prompt": "x", "stream": True, **body})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


async def test_a_failure_ends_the_stream_with_an_error_that_the_client_raises(server):
    async def fail(*_: Any) -> Any:
        raise GenerationFailedError("the replicas died")

    server.make = fail
    stream = await openai_client(server).images.generate(prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="the replicas died"):
        [event async for event in stream]


async def test_a_quiet_stream_is_kept_alive_and_its_end_cancels_the_work():
    never = asyncio.ensure_future(asyncio.Event().wait())
    events = picture_events("image_generation", {never: None}, PartialPictures(), keep_alive_s=0.01)
    assert (await anext(events)).startswith(b":")
    await events.aclose()
    await asyncio.sleep(0)
    assert never.cancelled()


async def test_events_are_framed_as_server_sent_events(server):
    answer = await server.post(GENERATIONS, json={"prompt": "x", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    name, data, end = answer.text.split("\n", 2)
    assert name == "event: image_generation.completed"
    assert json.loads(data.removeprefix("data: "))["type"] == "image_generation.completed"
    assert end == "\n"
