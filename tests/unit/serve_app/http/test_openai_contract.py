"""OpenAI's contract of pictures and videos, told by the types of its own client and not by a list of ours."""

from __future__ import annotations

import base64
import io
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import httpx
import httpx2
import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageGenCompletedEvent,
    ImagesResponse,
    VideoCreateError,
    image_edit_params,
    image_generate_params,
    video_create_params,
    video_edit_params,
    video_extend_params,
)
from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.messages import InputImage, Media, MediaFile, Usage
from serve_app.jobs import runner
from serve_app.requests.limits import RequestLimits
from tests.support.in_process import Server, description, picture, serving
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import make_video, video_file

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI's own videos end; the client says so

GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
TEXT = description("FluxPipeline")
KONTEXT = description("FluxKontextPipeline", "image", tasks=("text_to_image", "image_to_image"))
INPAINT = description("FluxInpaintPipeline", "image", "mask_image", "strength", tasks=("inpainting",))
LAYERED = description("QwenImageLayeredPipeline", "image", tasks=("image_to_image",), makes_alpha=True)
WAN = description(
    "WanPipeline", "image", "num_frames", "video", media_kind="video", frame_multiple=4,
    tasks=("text_to_video", "image_to_video", "video_to_video"),
)  # fmt: skip
PNG_URL = "data:image/png;base64," + base64.b64encode(picture()).decode()


@dataclass(frozen=True)
class Route:
    """A route of OpenAI's, the types of its parameters, and a body that it takes."""

    path: str
    params: type
    describing: Any
    body: dict[str, Any]


ROUTES = (
    Route(GENERATIONS, image_generate_params.ImageGenerateParamsNonStreaming, TEXT, {"prompt": "x"}),
    Route(EDITS, image_edit_params.ImageEditParamsNonStreaming, KONTEXT, {"prompt": "x", "image": PNG_URL}),
    Route(VIDEOS, video_create_params.VideoCreateParams, WAN, {"prompt": "x"}),
    Route(
        "/v1/videos/edits",
        video_edit_params.VideoEditParams,
        WAN,
        {"prompt": "x", "video": base64.b64encode(video_file()).decode()},
    ),
    Route(
        "/v1/videos/extensions",
        video_extend_params.VideoExtendParams,
        WAN,
        {"prompt": "x", "seconds": "1", "video": base64.b64encode(video_file()).decode()},
    ),
)


def hints(route: Route) -> dict[str, Any]:
    return typing.get_type_hints(route.params)


def nullable(route: Route) -> list[str]:
    return [name for name, hint in hints(route).items() if type(None) in get_args(hint)]


def words(hint: Any) -> Iterator[str]:
    """The values that a type lists."""
    if get_origin(hint) is Literal:
        yield from (value for value in get_args(hint) if isinstance(value, str))
    else:
        for part in get_args(hint):
            yield from words(part)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def openai_client(server: Server) -> openai.AsyncOpenAI:
    http_client = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(server))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)


# --- what is sent ---

routes = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)


@routes
async def test_null_stands_for_every_nullable_field_of_the_client(server: Server, route: Route) -> None:
    server.configure(route.describing)
    for name in nullable(route):
        answer = await server.post(route.path, json=route.body | {name: None})
        assert answer.status_code == 200, (name, answer.text)
    answer = await server.post(route.path, json=route.body | dict.fromkeys(nullable(route)))
    assert answer.status_code == 200, answer.text


@routes
async def test_forms_say_null_by_an_empty_value_or_the_word(server: Server, route: Route) -> None:
    if route.path == GENERATIONS:
        return  # OpenAI has no form of it
    server.configure(route.describing)
    for nothing in ("", "null"):
        form = dict.fromkeys(nullable(route), nothing) | route.body
        answer = await server.post(route.path, files={name: (None, value) for name, value in form.items()})
        assert answer.status_code == 200, answer.text


@routes
async def test_every_field_and_word_of_the_client_is_taken_or_refused_by_its_own_name(
    server: Server, route: Route
) -> None:
    server.configure(route.describing)
    for name, hint in hints(route).items():
        for value in words(hint):
            answer = await server.post(route.path, json=route.body | {name: value})
            if answer.status_code != 200:
                error = error_of(answer)
                assert (answer.status_code, error["code"] == "unknown_parameter") in ((400, False), (404, False)), error
                assert error["param"] in (name, "output_format"), (name, value, error)
        answer = await server.post(route.path, json=route.body | {name: {"no": "such value"}})
        assert (answer.status_code, error_of(answer)["code"] == "unknown_parameter") == (400, False), (
            name,
            answer.text,
        )
        assert (error_of(answer)["param"] or "").partition(".")[0] in (name, "mask"), (name, answer.text)


async def test_a_page_may_send_the_empty_file_of_a_field_that_was_not_chosen(server: Server) -> None:
    server.configure(KONTEXT)
    boundary, part = "x", 'Content-Disposition: form-data; name="{}"{}\r\n'
    chosen = part.format("image", '; filename="a.png"').encode() + b"\r\n" + picture()
    empty = part.format("mask", '; filename=""').encode() + b"Content-Type: application/octet-stream\r\n\r\n"
    prompt = part.format("prompt", "").encode() + b"\r\nx"
    body = b"".join(f"--{boundary}\r\n".encode() + each + b"\r\n" for each in (chosen, empty, prompt)) + b"--x--\r\n"
    answer = await server.post(EDITS, content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert answer.status_code == 200, answer.text


async def test_a_form_may_number_its_pictures_and_nest_its_objects(server: Server) -> None:
    server.configure(KONTEXT)
    pictures = [picture(16 * n, 16) for n in (1, 2, 3)]
    files: list[Any] = [(f"image[{n}]", ("a.png", data)) for n, data in reversed(list(enumerate(pictures)))]
    answer = await server.post(EDITS, data={"prompt": "x"}, files=files)
    assert answer.status_code == 200, answer.text
    assert server.requests[0].arguments["image"] == [InputImage(data) for data in pictures]
    svg = {"prompt": "x", "svg[reasoning][effort]": "low"}
    assert error_of(await server.post(EDITS, data=svg, files={"image": picture()}))["param"] == "svg"
    twice = [("images[0][image_url]", (None, PNG_URL))] * 2
    assert (await server.post(EDITS, data={"prompt": "x"}, files=twice)).status_code == 400


# --- pictures in every spelling ---


def spellings(data: bytes) -> dict[str, Any]:
    text = base64.b64encode(data).decode()
    wrapped = "\r\n".join(text[begin : begin + 76] for begin in range(0, len(text), 76))
    percent = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    return {
        "line breaks": wrapped,
        "final line break": text + "\n",
        "no padding": text.rstrip("="),
        "URL-safe": base64.urlsafe_b64encode(data).decode(),
        "data URL, line breaks": f"data:image/png;base64,{wrapped}",
        "data URL, charset": f"data:image/png;charset=utf-8;base64,{text}",
        "data URL, percent": f"data:image/png;base64,{percent}",
        "data URL, percent, no base64": "data:image/png," + "".join(f"%{byte:02X}" for byte in data),
        "data URL, upper case": f"DATA:image/png;BASE64,{text}",
        "data URL, no type": f"data:;base64,{text}",
        "object": {"image_url": f"data:image/png;base64,{text}", "file_id": None},
        "object as in chats": {"image_url": {"url": f"data:image/png;base64,{text}"}},
    }


async def test_a_picture_may_be_spelled_as_any_client_does(server: Server) -> None:
    server.configure(KONTEXT)
    data = picture(80, 48)
    for name, spelling in spellings(data).items():
        answer = await server.post(EDITS, json={"prompt": "x", "image": spelling})
        assert answer.status_code == 200, (name, answer.text)
        assert server.requests[-1].arguments["image"] == InputImage(data), name


async def test_what_is_no_spelling_is_refused_by_the_field(server: Server) -> None:
    server.configure(KONTEXT)
    for spelling in ("data:image/png;base64", "data:image/png;base64,%ZZ", "a", "!!!!", "ä"):
        answer = await server.post(EDITS, json={"prompt": "x", "image": spelling})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "image"), spelling


async def test_every_kind_of_picture_passes_the_door(server: Server) -> None:
    server.configure(KONTEXT)
    for format in ("png", "jpeg", "webp", "gif", "tiff", "bmp", "avif", "heif"):
        answer = await server.post(EDITS, data={"prompt": "x"}, files={"image": ("x", picture(48, 32, format))})
        assert answer.status_code == 200, answer.text


async def test_as_many_and_as_large_pictures_as_openai_takes(server: Server) -> None:
    server.configure(KONTEXT)
    limits = RequestLimits()
    assert (limits.max_input_images, limits.max_input_bytes) == (16, 50_000_000)
    assert limits.max_body_bytes >= limits.max_input_bytes * 4 / 3  # one of them, in base64
    many: list[Any] = [("image[]", ("a.png", picture()))] * 17
    assert (await server.post(EDITS, data={"prompt": "x"}, files=many[:16])).status_code == 200
    assert error_of(await server.post(EDITS, data={"prompt": "x"}, files=many))["code"] == "limit_exceeded"
    server.configure(KONTEXT, limits=RequestLimits(max_input_bytes=50))
    error = error_of(await server.post(EDITS, data={"prompt": "x"}, files=many[:1]))
    assert (error["param"], error["code"]) == ("image", "limit_exceeded")


# --- masks ---


def holed(width: int = 48, height: int = 32, mode: str = "RGBA", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG", **options)
    return file.getvalue()


async def test_the_pictures_own_alpha_is_the_mask_where_none_is_sent(server: Server) -> None:
    server.configure(INPAINT)
    for path, more in ((EDITS, {}), (GENERATIONS, {})):
        body = {"prompt": "x", "image": base64.b64encode(holed()).decode(), **more}
        assert (await server.post(path, json=body)).status_code == 200
        arguments = server.requests[-1].arguments
        assert arguments["mask_image"] == arguments["image"] == InputImage(holed())


@pytest.mark.parametrize(("path", "field"), [(EDITS, "mask"), (GENERATIONS, "mask_image")])
async def test_a_mask_is_missed_or_measured_under_the_name_that_the_route_has_for_it(
    server: Server, path: str, field: str
) -> None:
    server.configure(INPAINT)
    body = {"prompt": "x", "image": base64.b64encode(picture(48, 32)).decode()}
    error = error_of(await server.post(path, json=body))
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")
    error = error_of(await server.post(path, json=body | {field: base64.b64encode(holed(32, 32)).decode()}))
    assert (error["param"], error["code"]) == (field, "invalid_value")
    assert "48x32" in error["message"]
    assert "32x32" in error["message"]


async def test_sizes_of_masks_are_compared_upright(server: Server) -> None:
    server.configure(INPAINT)
    exif = Image.Exif()
    exif[0x0112] = 6
    form = {"prompt": "x"}
    sideways = holed(32, 48, "RGB", exif=exif)
    answer = await server.post(EDITS, data=form, files={"image": sideways, "mask": holed(48, 32)})
    assert answer.status_code == 200, answer.text
    answer = await server.post(EDITS, data=form, files={"image": sideways, "mask": holed(32, 48)})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "mask")


# --- what comes back ---


async def counted(request: Any) -> Media:
    data = picture(32, 32, request.output.format)
    file = MediaFile(data, f"image/{request.output.format}", 32, 32)
    return Media((file,), {"decode": 0.1}, Usage(text_tokens=5, image_tokens=4, output_tokens=16))


async def test_answers_have_usage_background_and_the_end_user(server: Server) -> None:
    server.make = counted
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"safety_identifier": "me", "user": "other"}, "me"),
        ({"safety_identifier": "", "user": "other"}, "other"),
        ({}, None),
    ]
    for fields, end_user in cases:
        answer = await server.post(GENERATIONS, json={"prompt": "x", "n": 2, **fields})
        read = ImagesResponse.model_validate(answer.json(), strict=True)
        assert (read.safety_identifier, read.background) == (end_user, "opaque")
        assert read.usage is not None
        assert (read.usage.input_tokens, read.usage.output_tokens, read.usage.total_tokens) == (18, 32, 50)
        assert (read.usage.input_tokens_details.text_tokens, read.usage.input_tokens_details.image_tokens) == (10, 8)


async def test_the_event_of_a_finished_picture_has_them_too(server: Server) -> None:
    server.make = counted
    server.configure(KONTEXT)
    client = openai_client(server)
    stream: Any = await client.images.generate(prompt="x", stream=True, safety_identifier="me")
    edit: Any = await client.images.edit(image=picture(), prompt="x", stream=True, user="me")
    for events, kind in ((stream, ImageGenCompletedEvent), (edit, ImageEditCompletedEvent)):
        [event] = [event async for event in events]
        kind.model_validate(event.model_dump())
        assert (event.usage.total_tokens, event.safety_identifier, event.background) == (25, "me", "opaque")


async def test_a_job_remembers_them(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=LAYERED) as (server, client):
        server.make = counted
        body = {"prompt": "x", "user": "me", "image": PNG_URL}
        answer = await client.post(EDITS, json=body, headers={"Idempotency-Key": "k"})
    read = ImagesResponse.model_validate(answer.json(), strict=True)
    assert (read.safety_identifier, read.background) == ("me", "transparent")
    assert read.usage is not None
    assert read.usage.total_tokens == 25


async def test_a_background_is_transparent_where_the_model_makes_alpha(server: Server) -> None:
    server.configure(LAYERED)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "transparent"),
        ({"background": "transparent"}, "transparent"),
        ({"background": "opaque"}, "opaque"),
        ({"background": "transparent", "output_format": "webp"}, "transparent"),
        ({"output_format": "jpeg"}, "opaque"),
    ]
    for fields, background in cases:
        answer = await server.post(EDITS, json={"prompt": "x", "image": PNG_URL, **fields})
        assert answer.json()["background"] == server.requests[-1].output.background == background


async def test_a_transparent_background_is_refused_where_there_is_none_to_have(server: Server) -> None:
    transparent = {"prompt": "x", "image": PNG_URL, "background": "transparent"}
    for describing, more in ((KONTEXT, {}), (LAYERED, {"output_format": "jpeg"})):
        server.configure(describing)
        answer = await server.post(EDITS, json=transparent | more)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "background")


# --- moving pictures ---


async def test_a_model_of_videos_makes_moving_pictures(server: Server) -> None:
    server.configure(WAN)
    cases: list[tuple[dict[str, Any], int, int, float]] = [
        ({"output_format": "gif"}, 9, 9, 5.0),
        ({"output_format": "gif", "frame_count": 16}, 16, 17, 5.0),
        ({"output_format": "webp", "frame_count": 2, "frame_duration_ms": 100}, 2, 5, 10.0),
    ]
    for fields, frames, asked_of_the_model, fps in cases:
        answer = await server.post(GENERATIONS, json={"prompt": "x", **fields})
        assert answer.status_code == 200, answer.text
        assert ImagesResponse.model_validate(answer.json(), strict=True).output_format == fields["output_format"]
        request = server.requests[-1]
        assert request.arguments["num_frames"] == asked_of_the_model
        assert (request.output.kind, request.output.max_frames, request.output.fps) == ("video", frames, fps)


NO_MOVING_PICTURES: list[tuple[Any, list[tuple[dict[str, Any], str]]]] = [
    (
        TEXT,
        [
            ({"output_format": "gif"}, "output_format"),
            ({"output_format": "webp", "frame_count": 3}, "frame_count"),
            ({"frame_duration_ms": 100}, "frame_duration_ms"),
            ({"output_format": "svg"}, "output_format"),
            ({"svg": {"model": "x"}}, "svg"),
        ],
    ),
    (
        WAN,
        [
            ({"output_format": "png", "frame_count": 3}, "frame_count"),
            ({"output_format": "gif", "frame_count": 17}, "frame_count"),
            ({"output_format": "gif", "num_frames": 33}, "frame_count"),
            ({"output_format": "gif", "stream": True}, "stream"),
            ({"output_format": "gif", "partial_images": 1, "background": True}, "partial_images"),
            ({"output_format": "gif", "background": "transparent"}, "background"),
            ({"output_format": "png"}, "model"),
        ],
    ),
]


@pytest.mark.parametrize(("describing", "cases"), NO_MOVING_PICTURES, ids=["pictures", "videos"])
async def test_moving_pictures_that_cannot_be_are_refused_by_name(server: Server, describing: Any, cases: Any) -> None:
    server.configure(describing)
    for fields, param in cases:
        answer = await server.post(GENERATIONS, json={"prompt": "x", **fields})
        assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


async def test_markup_is_laid_over_the_first_picture(server: Server) -> None:
    server.configure(KONTEXT)
    markup = Image.new("RGBA", (32, 32))
    markup.paste((0, 255, 0, 255), (0, 0, 16, 32))
    file = io.BytesIO()
    markup.save(file, "PNG")
    files: list[Any] = [("image[]", picture()), ("image[]", picture(16, 16)), ("markup", file.getvalue())]
    answer = await server.post(EDITS, data={"prompt": "x"}, files=files)
    assert answer.status_code == 200, answer.text
    arguments = server.requests[0].arguments
    first, second = arguments["image"]
    seen = Image.open(io.BytesIO(first.data))
    assert (seen.getpixel((0, 0)), seen.getpixel((31, 31))) == ((0, 255, 0), (200, 30, 30))
    assert second == InputImage(picture(16, 16))
    assert "markup" not in arguments


async def test_markup_that_cannot_be_laid_over_it_is_refused_by_name(server: Server) -> None:
    for describing, files in (
        (KONTEXT, {"markup": picture(32, 32)}),
        (KONTEXT, {"markup": holed(48, 32)}),
        (INPAINT, {"markup": holed(32, 32), "mask": holed(32, 32)}),
    ):
        server.configure(describing)
        answer = await server.post(EDITS, data={"prompt": "x"}, files={"image": picture(32, 32), **files})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "markup"), answer.text


async def test_a_video_may_be_a_gif_and_the_source_of_another(tmp_path: Path) -> None:
    async def make_gif(request: Any) -> Media:
        frames = [Image.new("RGB", (48, 32), (level, level, level)) for level in (0, 100, 200)]
        file = io.BytesIO()
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100)
        return Media((MediaFile(file.getvalue(), "image/gif", 48, 32, 3, 10.0),), {})

    async with server_with_jobs(tmp_path, describing=WAN) as (server, client):
        server.make = make_gif
        video = (await client.post(VIDEOS, json={"prompt": "x", "output_format": "gif"})).json()
        assert (await ended(client, video["id"]))["status"] == "completed"
        content = f"/v1/videos/{video['id']}/content"
        kinds = [(await client.get(content, params={"variant": each})).headers["content-type"]
                 for each in ("video", "thumbnail", "spritesheet")]  # fmt: skip
        assert kinds == ["image/gif", "image/webp", "image/jpeg"]
        edited = await client.post("/v1/videos/edits", json={"prompt": "x", "video": {"id": video["id"]}})
        assert (await ended(client, edited.json()["id"]))["status"] == "completed"
    assert len(server.requests[1].arguments["video"]) == 3


# --- videos ---


async def test_the_client_creates_lists_remixes_and_deletes_videos(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=WAN) as (server, client):
        server.make = make_video
        videos = openai_client(server).videos
        made: list[Any] = [await videos.create(prompt=str(n)) for n in range(3)]
        for each in made:
            await ended(client, each.id)
        assert [each.prompt async for each in await videos.list(limit=2, order="asc")] == ["0", "1", "2"]  # two pages
        remixed: Any = await videos.remix(made[0].id, prompt="another")
        assert (remixed.remixed_from_video_id, remixed.seed) == (made[0].id, made[0].seed)
        await ended(client, remixed.id)
        assert (await videos.delete(made[0].id)).deleted
        with pytest.raises(openai.NotFoundError):
            await videos.retrieve(made[0].id)


async def test_a_failed_video_says_why_as_the_client_reads_it(tmp_path: Path) -> None:
    async def refuse(_: Any) -> Media:
        raise InvalidRequestError("refused by the model", "prompt", "content_policy_violation")

    async with server_with_jobs(tmp_path, describing=WAN) as (server, client):
        server.make = refuse
        video = (await client.post(VIDEOS, json={"prompt": "x"})).json()
        await ended(client, video["id"])
        read: Any = await openai_client(server).videos.retrieve(video["id"])
    error = VideoCreateError.model_validate(read.error.model_dump(), strict=True)
    assert (read.status, error.code, error.message) == ("failed", "content_policy_violation", "refused by the model")
    assert (error.param, error.type) == ("prompt", "invalid_request_error")
