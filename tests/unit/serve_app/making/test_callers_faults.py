"""An error of the pipeline's own code is the caller's fault where a default request works, and ours where it fails."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from deployments.errors import GenerationFailedError, HandOffError, InvalidRequestError, PipelineFailedError
from deployments.errors import StageUnavailableError as Unavailable
from deployments.media.input_sounds import read_sound
from deployments.messages import GenerationRequest, InputImage, Media, OutputFormat, StageDescription, ValueType
from serve_app.making.follower import NOBODY, Follower
from serve_app.making.layers.callers_faults import CallersFaults
from serve_app.making.layers.default_request import default_requests
from serve_app.making.served_model import ServedModel
from tests.support.in_process import TEXT_TO_IMAGE, description, make_at_once, until
from tests.support.played_stages import PlayedHandle, played

FAILURE = PipelineFailedError("IndexError: list index out of range")
FAILS_ALWAYS = lambda request: FAILURE  # noqa: E731
INPAINTING = dataclasses.replace(
    description("FluxFillPipeline", "image", "mask_image"), tasks=("inpainting",), required=("image",)
)


def fails_with_extras(request: GenerationRequest) -> Exception | None:
    return FAILURE if "sigmas" in request.arguments else None


class Making:
    """Plays the stages; notes what was asked of them."""

    def __init__(self, failure: Callable[[GenerationRequest], Exception | None]) -> None:
        self.failure = failure
        self.made: list[GenerationRequest] = []

    async def __call__(self, request: GenerationRequest, follower: Follower) -> Media:
        self.made.append(request)
        error = self.failure(request)
        if error is not None:
            raise RayTaskError("denoise", "a traceback with /a/path", error).as_instanceof_cause()
        return await make_at_once(request)


def faults(making: Making, describing: StageDescription = TEXT_TO_IMAGE) -> CallersFaults:
    model = ServedModel("m", played(PlayedHandle(describing, make_at_once, make_at_once)))
    return CallersFaults(making, model)


def asked(**arguments: Any) -> GenerationRequest:
    return GenerationRequest("r", "m", {"prompt": "a fox"} | arguments, 0, OutputFormat("image", "png"))


async def test_what_fails_while_a_default_request_works_is_refused_with_the_argument() -> None:
    making = Making(fails_with_extras)
    with pytest.raises(InvalidRequestError) as caught:
        await faults(making).make(asked(sigmas=[0.5], num_inference_steps=9))
    assert (caught.value.param, caught.value.code) == ("sigmas", "unusable_arguments")
    assert caught.value.message == (
        "FluxPipeline cannot use sigmas=[0.5] (IndexError: list index out of range); its own defaults work"
    )
    [_, tried] = making.made
    assert tried.arguments == {"prompt": "a picture", "width": 128, "height": 128, "num_inference_steps": 2}


async def test_what_fails_as_default_requests_do_is_a_failure_of_the_server() -> None:
    making = Making(FAILS_ALWAYS)
    with pytest.raises(GenerationFailedError, match="also with default arguments"):
        await faults(making).make(asked(sigmas=[0.5]))
    assert [len(request.arguments) for request in making.made] == [2, 4, 2, 1]


async def test_a_default_request_is_tried_once_for_all_that_fail_together() -> None:
    making = Making(fails_with_extras)
    layer = faults(making)
    outcomes = await asyncio.gather(*(layer.make(asked(sigmas=[i])) for i in range(5)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {InvalidRequestError}
    assert len(making.made) == 6


async def test_the_trial_goes_on_for_all_when_the_first_caller_leaves() -> None:
    made: list[GenerationRequest] = []
    go = asyncio.Event()

    async def make(request: GenerationRequest, follower: Follower) -> Media:
        made.append(request)
        if "sigmas" in request.arguments:
            raise FAILURE
        await go.wait()
        return await make_at_once(request)

    layer = CallersFaults(make, ServedModel("m", played(PlayedHandle(TEXT_TO_IMAGE, make_at_once, make_at_once))))
    first, second = (asyncio.create_task(layer.make(asked(sigmas=[i]))) for i in range(2))
    await until(lambda: len(made) == 3)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    go.set()
    with pytest.raises(InvalidRequestError):
        await second
    assert len(made) == 3


async def test_no_default_request_is_tried_after_a_request_that_worked() -> None:
    making = Making(fails_with_extras)
    layer = faults(making)
    await layer.make(asked())
    with pytest.raises(InvalidRequestError):
        await layer.make(asked(sigmas=[1]))
    assert len(making.made) == 2


async def test_a_small_size_that_the_model_cannot_make_is_no_failure_of_its_defaults() -> None:
    making = Making(lambda request: FAILURE if "sigmas" in request.arguments or "width" in request.arguments else None)
    with pytest.raises(InvalidRequestError):
        await faults(making).make(asked(sigmas=[1]))
    assert len(making.made) == 3


@pytest.mark.parametrize("error", [HandOffError("no"), GenerationFailedError("died"), RuntimeError("CUDA error")])
async def test_other_failures_are_nobodys_to_judge(error: Exception) -> None:
    making = Making(lambda request: error)
    with pytest.raises(type(error)):
        await faults(making).make(asked(sigmas=[1]))
    assert len(making.made) == 1


async def test_a_stage_that_is_away_while_the_default_request_is_tried_is_told_as_that() -> None:
    making = Making(lambda request: FAILURE if "sigmas" in request.arguments else Unavailable("away"))
    with pytest.raises(Unavailable):
        await faults(making).make(asked(sigmas=[1]))


@pytest.mark.parametrize(
    ("arguments", "error", "param"),
    [
        ({"width": 64, "height": 64}, "RuntimeError: shape", None),
        ({}, "RuntimeError: shape", "prompt"),
        ({"eta": 9, "clip_skip": 99}, "IndexError: clip_skip is too large", "clip_skip"),
        ({"eta": 9, "clip_skip": 99}, "IndexError", None),
        ({"clip_skip": 99, "width": 64, "guidance_scale": 2.0}, "IndexError", "clip_skip"),
        ({"image": InputImage(b"")}, "ValueError: shape", "mask_image"),
        ({"image": InputImage(b""), "mask_image": InputImage(b"")}, "ValueError: mask_image is empty", "mask_image"),
    ],
)
async def test_the_argument_that_is_named_or_stands_alone_is_the_one_at_fault(
    arguments: dict[str, Any], error: str, param: str | None
) -> None:
    making = Making(lambda request: PipelineFailedError(error) if request.request_id == "r" else None)
    with pytest.raises(InvalidRequestError) as caught:
        await faults(making, INPAINTING).make(asked(**arguments), NOBODY)
    assert caught.value.param == param


def test_a_default_request_has_the_pictures_that_the_model_begins_with() -> None:
    small, own, default = default_requests(INPAINTING, "m", {"guidance_scale": 30.0})
    for request in (small, own, default):
        assert isinstance(request.arguments["image"], InputImage)
        assert isinstance(request.arguments["mask_image"], InputImage)
        assert request.arguments["guidance_scale"] == 30.0
    assert "num_inference_steps" not in default.arguments


def test_a_default_request_has_whatever_the_pipelines_call_requires() -> None:
    integers = ValueType("list", (ValueType("int"),))
    types = {
        "token_indices": ValueType("union", (integers, ValueType("list", (integers,)))),
        "source_prompt": ValueType("union", (ValueType("str"), ValueType("list", (ValueType("str"),)))),
        "source_audio": ValueType("sound"),
        "reference_image": ValueType("picture"),
    }
    described = description("APipeline", *types, argument_types=types, required=tuple(types))
    [arguments, *_] = [request.arguments for request in default_requests(described, "m", {})]
    assert (arguments["token_indices"], arguments["source_prompt"]) == ([1], "a picture")
    assert isinstance(arguments["reference_image"], InputImage)
    sound = read_sound(arguments["source_audio"].data, "source_audio", max_s=2)
    assert (sound.rate, sound.samples.shape) == (16_000, (1, 16_000))
