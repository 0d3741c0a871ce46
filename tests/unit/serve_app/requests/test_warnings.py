"""Fields that mean nothing: named in `warnings`, refused, or dropped where the body is not strict."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import pytest
from diffusers import FluxPipeline, StableDiffusionImg2ImgPipeline, WanPipeline
from pydantic import ValidationError

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import GenerationRequest
from serve_app.requests.bodies import ImageGenerationBody, VideoGenerationBody
from serve_app.requests.edit_bodies import ImageEditBody
from serve_app.requests.limits import RequestLimits
from serve_app.requests.translate import Levels, to_generation_requests
from tests.support.descriptions import description_of
from tests.support.in_process import picture

PICTURE = base64.b64encode(picture()).decode()
LEVELS: Levels = {"low": {"num_inference_steps": 4}, "high": {"num_inference_steps": 40, "guidance_scale": 5.0}}


def requested(
    pipeline: type = FluxPipeline, kind: Any = ImageGenerationBody, levels: Levels | None = None, **fields: Any
) -> GenerationRequest:
    body = kind.model_validate({"prompt": "a fox", "seed": 1} | fields)
    [request] = to_generation_requests(body, description_of(pipeline), RequestLimits(), "r", "tiny", {}, levels)
    return request


def warned(request: GenerationRequest) -> list[tuple[str, str | None]]:
    return [(warning.code, warning.param) for warning in request.warnings]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quality", "hd"),
        ("quality", "auto"),
        ("style", "vivid"),
        ("moderation", "low"),
        ("output_compression", 100),
    ],
)
def test_openais_fields_that_mean_nothing_here_are_accepted_and_named(field: str, value: Any) -> None:
    request = requested(**{field: value})
    assert warned(request) == [("no_effect", field)]
    assert dataclasses.replace(request, warnings=()) == requested()


def test_a_field_without_value_is_not_named() -> None:
    assert requested(quality=None, style=None).warnings == ()


def test_an_edit_names_the_fidelity_that_the_model_decides() -> None:
    request = requested(StableDiffusionImg2ImgPipeline, ImageEditBody, image=PICTURE, input_fidelity="high")
    assert warned(request) == [("no_effect", "input_fidelity")]


@pytest.mark.parametrize(("level", "steps"), [("low", 4), ("high", 40), ("auto", 28), (None, 28)])
def test_a_level_of_quality_stands_for_its_arguments(level: str | None, steps: int) -> None:
    request = requested(levels=LEVELS, quality=level)
    assert (request.arguments["num_inference_steps"], request.warnings) == (steps, ())


def test_what_the_caller_says_comes_before_the_level() -> None:
    request = requested(levels=LEVELS, quality="high", num_inference_steps=7)
    assert (request.arguments["num_inference_steps"], request.arguments["guidance_scale"]) == (7, 5.0)


def test_a_level_that_nobody_configured_is_named_with_those_that_are() -> None:
    [warning] = requested(levels=LEVELS, quality="hd").warnings
    assert "levels are low, high" in warning.message


@pytest.mark.parametrize("no", [False, "false", "False", "0"])
@pytest.mark.parametrize(
    ("pipeline", "kind", "field", "value", "code"),
    [
        (FluxPipeline, ImageGenerationBody, "strength", 0.5, "no_effect"),
        (FluxPipeline, ImageGenerationBody, "image", PICTURE, "no_effect"),
        (FluxPipeline, ImageGenerationBody, "extra_args", {"eta": 0.5}, "no_effect"),
        (FluxPipeline, ImageGenerationBody, "frame_duration_ms", 100, "no_effect"),
        (FluxPipeline, ImageGenerationBody, "cfg_rescale", 2, "unknown_parameter"),
        (StableDiffusionImg2ImgPipeline, ImageEditBody, "size", "64x64", "no_effect"),
        (StableDiffusionImg2ImgPipeline, ImageEditBody, "mask", PICTURE, "no_effect"),
        (WanPipeline, VideoGenerationBody, "true_cfg_scale", 2.0, "no_effect"),
    ],
)
def test_without_strict_a_field_without_effect_is_dropped_and_named(
    pipeline: type, kind: Any, field: str, value: Any, code: str, no: Any
) -> None:
    needed = {"image": PICTURE} if kind is ImageEditBody else {}
    with pytest.raises((InvalidRequestError, ValidationError)):
        requested(pipeline, kind, **needed, **{field: value})
    request = requested(pipeline, kind, strict=no, **needed, **{field: value})
    [warning] = request.warnings
    assert (warning.code, str(warning.param).removesuffix(".eta").removesuffix("_image")) == (code, field)
    assert request.left_out == (request.warnings if field not in ("cfg_rescale", "frame_duration_ms") else ())
    assert dataclasses.replace(request, warnings=(), left_out=()) == requested(pipeline, kind, **needed)


def test_without_strict_a_wrong_value_is_still_refused() -> None:
    with pytest.raises(InvalidRequestError, match="multiple of 16"):
        requested(strict=False, size="33x32")
    with pytest.raises(NotSupportedError, match="cannot be sent"):
        requested(strict=False, extra_args={"latents": [1]})


def test_extra_body_may_say_it_too() -> None:
    assert warned(requested(extra_body={"strict": False, "cfg": 1})) == [("unknown_parameter", "cfg")]
