"""Values of the wrong type are refused with the field, the value and what is allowed; the right ones pass."""

from __future__ import annotations

import re
from typing import Any

import pytest
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.messages import ValueType
from deployments.stage_pipeline.argument_types import argument_types, value_type
from deployments.stage_pipeline.description import call_parameters
from serve_app.requests.argument_values import argument_value, takes_one_picture
from serve_app.requests.limits import RequestLimits

LIMITS = RequestLimits()


def given(pipeline: type, name: str, value: Any) -> Any:
    parameters, _ = call_parameters(pipeline)
    return argument_value(f"extra_args.{name}", value, argument_types(pipeline, parameters)[name], LIMITS)


@pytest.mark.parametrize(
    ("pipeline", "name", "value", "says"),
    [
        (FluxPipeline, "sigmas", "x", "a list of which each is a number or null, got 'x'"),
        (FluxPipeline, "sigmas", ["x"], r"a list .* number .* got \['x'\]"),
        (FluxPipeline, "sigmas", {}, r"a list .* number .* got \{\}"),
        (FluxPipeline, "sigmas", [None], r"a list .* number .* got \[None\]"),
        (FluxPipeline, "sigmas", 3, "a list .* number .* got 3"),
        (FluxPipeline, "sigmas", [True], r"a list .* number .* got \[True\]"),
        (FluxPipeline, "sigmas", [[1.0]], "a list .* number"),
        (FluxPipeline, "sigmas", [1e300], "between -1000000 and 1000000, got 1e"),
        (FluxPipeline, "sigmas", [float("nan")], "between -1000000 and 1000000, got nan"),
        (FluxPipeline, "sigmas", [0.5] * 201, "at most 200 entries, got 201"),
        (FluxPipeline, "joint_attention_kwargs", 5, "an object or null, got 5"),
        (FluxPipeline, "joint_attention_kwargs", [], r"an object or null, got \[\]"),
        (FluxPipeline, "joint_attention_kwargs", {"x": 10**30}, "between -1000000 and 1000000"),
        (FluxPipeline, "joint_attention_kwargs", {"x": "y" * 20_001}, "at most 20000 characters"),
        (FluxPipeline, "prompt_2", 5, "a text or a list of which each is a text or null, got 5"),
        (FluxPipeline, "prompt_2", [1], "a text"),
        (FluxPipeline, "ip_adapter_image", "x", "a picture or a list of which each is a picture or null, got 'x'"),
        (FluxPipeline, "ip_adapter_image", [5], r"a picture or a list .* got \[5\]"),
        (FluxPipeline, "prompt_embeds", [5], "does not take a plain value, so it cannot be sent as JSON"),
        (StableDiffusionPipeline, "clip_skip", True, "a whole number or null, got True"),
        (StableDiffusionPipeline, "clip_skip", 1.5, "a whole number or null, got 1.5"),
        (StableDiffusionPipeline, "clip_skip", "1", "a whole number or null, got '1'"),
        (StableDiffusionPipeline, "eta", None, "a number, got None"),
        (StableDiffusionXLPipeline, "original_size", [512], "a list of 2: a whole number, a whole number or null"),
        (StableDiffusionXLPipeline, "original_size", [512, "x"], "a list of 2"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(pipeline: type, name: str, value: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        given(pipeline, name, value)
    assert caught.value.param == f"extra_args.{name}"
    assert name in caught.value.message
    assert re.search(says, caught.value.message), caught.value.message


@pytest.mark.parametrize(
    ("pipeline", "name", "value", "taken"),
    [
        (FluxPipeline, "sigmas", [1, 0.5], [1, 0.5]),
        (FluxPipeline, "joint_attention_kwargs", {"scale": 0.5}, {"scale": 0.5}),
        (FluxPipeline, "ip_adapter_image", None, None),
        (StableDiffusionPipeline, "clip_skip", 2.0, 2),
        (StableDiffusionPipeline, "eta", 1, 1),
        (StableDiffusionXLPipeline, "original_size", [512.0, 768], [512, 768]),
    ],
)
def test_a_value_of_the_right_type_comes_through(pipeline: type, name: str, value: Any, taken: Any) -> None:
    came = given(pipeline, name, value)
    assert came == taken
    assert type(came) is type(taken)


def test_a_deep_value_is_refused_whatever_its_type() -> None:
    value: Any = 1
    for _ in range(900):
        value = [value]
    with pytest.raises(InvalidRequestError, match="8 deep"):
        argument_value("x", value, ValueType("any"), LIMITS)


def test_one_picture_is_what_an_annotation_without_a_list_or_a_tensor_takes() -> None:
    assert takes_one_picture(value_type(Image.Image | None))
    assert not takes_one_picture(value_type(Image.Image | list[Image.Image]))
    assert not takes_one_picture(ValueType("any"))


@pytest.mark.parametrize("place", ["{:>2000000000}", "{0.__class__}", "{0[0]}", "{!r:>9}"])
def test_a_template_has_plain_places_only(place: str) -> None:
    wanted = ValueType("any")
    with pytest.raises(InvalidRequestError, match="prompt_template must have plain places"):
        argument_value("prompt_template", {"template": f"Describe {place}"}, wanted, RequestLimits())
    good = {"template": "<|user|>{}<|end|> {{x: 1}}", "crop_start": 4}
    assert argument_value("prompt_template", good, wanted, RequestLimits()) == good
