"""What a model tells of its defaults is what a request that names nothing is made with, whoever set them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.messages import ArgumentNotes, StageDescription, ValueType
from serve_app.requests.outputs import MEDIA
from tests.support.in_process import Server, description, serving

NUMBER, WORDS = ValueType("float"), ValueType("str")
PICTURES = description(
    "FluxPipeline",
    "sigmas",
    "max_sequence_length",
    "strength",
    "use_detail",
    "mode",
    default_width=1024,
    default_height=1024,
    argument_types={
        "sigmas": ValueType("list", (NUMBER,)),
        "strength": NUMBER,
        "mode": WORDS,
        "use_detail": ValueType("bool"),
    },
    argument_notes={"mode": ArgumentNotes("how fine", default="fast")},
)
VIDEOS = description(
    "LTXPipeline",
    "num_frames",
    "frame_rate",
    "decode_timestep",
    media_kind="video",
    default_width=832,
    default_height=480,
    argument_types={"decode_timestep": NUMBER},
)
CONFIGURED: list[tuple[StageDescription, dict[str, Any]]] = [
    (PICTURES, {}),
    (PICTURES, {"default_arguments": {"width": 128, "height": 64}}),
    (PICTURES, {"default_arguments": {"width": 128}}),
    (PICTURES, {"default_arguments": {"num_inference_steps": 20, "guidance_scale": 1.5, "negative_prompt": "rain"}}),
    (
        PICTURES,
        {"default_arguments": {"sigmas": [1.0, 0.5], "max_sequence_length": 77, "strength": 0, "use_detail": True}},
    ),
    (
        PICTURES,
        {
            "default_arguments": {"width": 128, "guidance_scale": 2.5},
            "quality": {
                "auto": {"height": 96, "guidance_scale": 1.0, "num_inference_steps": 9},
                "low": {"num_inference_steps": 2, "width": 64},
            },
        },
    ),
    (
        VIDEOS,
        {"default_arguments": {"width": 64, "height": 32, "num_frames": 9, "frame_rate": 12, "decode_timestep": 0.1}},
    ),
    (VIDEOS, {"quality": {"auto": {"num_frames": 5, "frame_rate": 8}, "draft": {"num_frames": 1}}}),
]


@pytest.mark.parametrize(("describing", "args"), CONFIGURED)
async def test_what_is_told_is_what_a_request_that_names_nothing_is_made_with(
    tmp_path: Path, describing: StageDescription, args: dict[str, Any]
) -> None:
    with serving(tmp_path) as server:
        server.configure(describing, **args)
        details = await details_of(server)
        levels = {None, *details["levels"]}
        for level in levels:
            told = told_defaults(details, level)
            made = await made_of(server, level)
            assert told == made, level


async def test_the_openapi_document_tells_the_configured_defaults_of_the_models_own_arguments(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.configure(PICTURES, default_arguments={"mode": "fine"}, quality={"auto": {"use_detail": True}})
        async with server.client() as client:
            schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    fields = schemas["ImageGenerationBody"]["properties"]
    assert (fields["mode"]["default"], fields["use_detail"]["default"]) == ("fine", True)


@pytest.mark.parametrize(("describing", "args"), CONFIGURED[4:7])
async def test_the_openapi_document_tells_the_same_defaults_as_the_model_does(
    tmp_path: Path, describing: StageDescription, args: dict[str, Any]
) -> None:
    with serving(tmp_path) as server:
        server.configure(describing, **args)
        details = await details_of(server)
        paths, schemas = await document_of(server)
    name = MEDIA[describing.media_kind].body.__name__
    bodies = [schemas[name], *(form for form in forms_in(paths) if form["title"] == name)]
    if describing is PICTURES:
        bodies += [form for form in forms_in(paths) if form["title"] == "ImageEditBody"]
    assert len(bodies) >= 2
    size = details["asked"]["size"]
    for body in bodies:
        fields = body["properties"]
        for each in details["arguments"]:
            if each["field"] != "size" and each["default"] is not None:
                assert fields[each["field"]]["default"] == each["default"], each["name"]
        assert fields["size"]["default"] == f"{size['default_width']}x{size['default_height']}"


async def test_the_openapi_document_tells_the_default_of_each_of_several_models(tmp_path: Path) -> None:
    models = {"flux": {"default_arguments": {"guidance_scale": 2.0}}, "sd3": {"quality": {"auto": {"width": 512}}}}
    with serving(tmp_path) as server:
        server.configure(several={"flux": PICTURES, "sd3": PICTURES, "ltx": VIDEOS}, models=models | {"ltx": {}})
        _, schemas = await document_of(server)
    pictures, videos = (schemas[name]["properties"] for name in ("ImageGenerationBody", "VideoGenerationBody"))
    assert pictures["num_inference_steps"]["default"] == 4
    assert pictures["guidance_scale"]["description"].endswith("default: flux 2.0, sd3 3.5")
    assert pictures["size"]["description"].endswith('; default: flux "1024x1024", sd3 "512x1024"')
    assert videos["size"]["default"] == "832x480"


async def document_of(server: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its paths, and its schemas."""
    async with server.client() as client:
        document = (await client.get("/openapi.json")).json()
    return document["paths"], document["components"]["schemas"]


def forms_in(paths: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [each.get("requestBody", {}).get("content", {}) for path in paths.values() for each in path.values()]
    return [each["multipart/form-data"]["schema"] for each in contents if "multipart/form-data" in each]


def told_defaults(details: dict[str, Any], level: str | None) -> dict[str, Any]:
    """By argument, without those that the pipeline decides itself."""
    size = details["asked"]["size"]
    told = {each["name"]: each["default"] for each in details["arguments"]}
    assert (told["width"], told["height"]) == (size["default_width"], size["default_height"])
    return without_nulls(told | details["levels"].get(level, {}))


async def details_of(server: Server) -> dict[str, Any]:
    async with server.client() as client:
        details: dict[str, Any] = (await client.get("/v1/models/flux")).json()
    return details


async def made_of(server: Server, level: str | None) -> dict[str, Any]:
    """The arguments of a request of a level, those of the pipeline's own defaults filled in."""
    named = {} if level is None else {"quality": level}
    own = server.handle.describing
    body = MEDIA[own.media_kind].body.model_validate({"prompt": "a fox", **named})
    [request] = await server.model.parse(body, "")
    sides = {"width": own.default_width, "height": own.default_height}
    return without_nulls(own.parameters | sides | {k: v for k, v in request.arguments.items() if k != "prompt"})


def without_nulls(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
