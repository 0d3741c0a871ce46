"""Bodies against the signatures of diffusers' pipelines, answers against the types of the OpenAI client."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from typing import Any

import openai.types
import pytest
from diffusers import DDPMPipeline, FluxPipeline, LTXPipeline, StableDiffusionImg2ImgPipeline, WanPipeline
from diffusers import StableVideoDiffusionPipeline as SVDPipeline
from PIL import Image
from pydantic import ValidationError

from deployments.errors import InvalidRequestError, ModelNotFoundError, NotSupportedError
from deployments.messages import (
    GenerationRequest,
    InputImage,
    Media,
    MediaFile,
    OutputFormat,
)
from serve_app.http.answers import GeneratedItem, ModelCard, ModelList, answer_of
from serve_app.requests.bodies import ImageGenerationBody, VideoGenerationBody
from serve_app.requests.limits import RequestLimits
from serve_app.requests.translate import to_generation_requests
from tests.support.descriptions import description_of

LIMITS = RequestLimits()


def image_requests(pipeline: type = FluxPipeline, *, limits: RequestLimits = LIMITS, **fields: Any):
    body = ImageGenerationBody.model_validate({"prompt": "a fox"} | fields)
    return to_generation_requests(body, description_of(pipeline), limits, "r", "tiny")


def video_requests(pipeline: type = WanPipeline, *, limits: RequestLimits = LIMITS, **fields: Any):
    body = VideoGenerationBody.model_validate({"prompt": "a fox"} | fields)
    return to_generation_requests(body, description_of(pipeline), limits, "r", "tiny")


def refused(param: str, make: Any = image_requests, error: type = InvalidRequestError, **fields: Any) -> str:
    with pytest.raises(error) as caught:
        make(**fields)
    assert caught.value.param == param
    return str(caught.value)


def file_of(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format)
    return buffer.getvalue()


PNG = file_of("PNG")
PNG_TEXT = base64.b64encode(PNG).decode()


# --- what reaches the pipeline ---


def test_a_prompt_alone_leaves_everything_to_the_pipeline_but_says_the_steps():
    [request] = image_requests()
    assert request.arguments == {"prompt": "a fox", "num_inference_steps": 28}  # 28: FluxPipeline.__call__
    assert request.output == OutputFormat("image", "png")
    assert (request.request_id, request.model) == ("r", "tiny")
    assert 0 <= request.seed < 2**32


def test_every_field_that_is_set_reaches_the_pipeline_under_its_own_name():
    [request] = image_requests(
        size="512x256",
        seed=5,
        negative_prompt="rain",
        num_inference_steps=3,
        guidance_scale=2,
        true_cfg_scale=1.5,
        max_sequence_length=64,
        output_format="webp",
        output_compression=80,
        extra_args={"prompt_2": "a hare", "sigmas": [1.0, 0.5]},
    )
    assert request.arguments == {
        "prompt": "a fox",
        "width": 512,
        "height": 256,
        "negative_prompt": "rain",
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "true_cfg_scale": 1.5,
        "max_sequence_length": 64,
        "prompt_2": "a hare",
        "sigmas": [1.0, 0.5],
    }
    assert request.output == OutputFormat("image", "webp", 80)


def test_what_a_request_sets_comes_before_the_defaults_of_the_application():
    body = ImageGenerationBody(prompt="a fox", guidance_scale=1.0, size="auto")
    defaults = {"num_inference_steps": 4, "guidance_scale": 9.0, "width": 64, "height": 32}
    [request] = to_generation_requests(body, description_of(FluxPipeline), LIMITS, "r", "tiny", defaults)
    assert request.arguments == defaults | {"prompt": "a fox", "guidance_scale": 1.0}
    assert defaults["guidance_scale"] == 9.0


def test_n_gives_as_many_requests_with_seeds_counting_up():
    requests = image_requests(n=3, seed=7)
    assert [request.seed for request in requests] == [7, 8, 9]
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
    requests[0].arguments["prompt"] = "changed"
    assert requests[1].arguments["prompt"] == "a fox"


def test_seeds_that_were_not_given_differ_from_request_to_request():
    assert len({image_requests()[0].seed for _ in range(5)}) > 1


# --- what is refused ---


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_an_empty_prompt_is_refused(prompt):
    assert "must not be empty" in refused("prompt", prompt=prompt)


def test_a_model_that_reads_no_text_needs_no_prompt_and_takes_none():
    [request] = image_requests(DDPMPipeline, prompt=None)
    assert "prompt" not in request.arguments
    assert "DDPMPipeline" in refused("prompt", error=NotSupportedError, pipeline=DDPMPipeline)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("500x512", "width must be a multiple of 16, got 500; the nearest are 496 or 512"),
        ("512x8", "height must be a multiple of 16, got 8; the nearest are 16"),
        ("4096x4096", "at most 4194304 pixels .width x height., got 16777216"),
        ("65536x16", "at most 8192 pixels of width, got 65536"),
    ],
)
def test_a_wrong_size_is_refused_with_the_side_and_what_is_allowed(size, says):
    assert re.search(says, refused("size", size=size))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n", 11, "at most 10, got 11"),
        ("num_inference_steps", 201, "at most 200, got 201"),
        ("prompt", "x" * 20_001, "at most 20000 characters, got 20001"),
        ("negative_prompt", "x" * 20_001, "at most 20000 characters"),
    ],
)
def test_what_passes_a_limit_is_refused_with_the_limit(field, value, says):
    message = refused(field, **{field: value})
    assert says in message
    assert len(message) < 200


def test_the_limits_are_those_of_the_application():
    assert len(image_requests(limits=RequestLimits(max_images=11), n=11)) == 11
    assert "at most 1" in refused("n", limits=RequestLimits(max_images=1), n=2)


@pytest.mark.parametrize(
    ("pipeline", "make", "field", "value"),
    [
        (FluxPipeline, image_requests, "strength", 0.5),
        (FluxPipeline, image_requests, "image", PNG_TEXT),
        (StableDiffusionImg2ImgPipeline, image_requests, "size", "512x512"),
        (StableDiffusionImg2ImgPipeline, image_requests, "true_cfg_scale", 2.0),
        (LTXPipeline, video_requests, "guidance_scale_2", 2.0),
        (SVDPipeline, video_requests, "prompt", "a fox"),
    ],
)
def test_a_field_that_the_pipeline_does_not_take_is_refused_by_name(pipeline, make, field, value):
    message = refused(field, make, NotSupportedError, pipeline=pipeline, **{field: value})
    assert message == f"{field} is not supported: {pipeline.__name__} does not take it"


def test_what_the_pipeline_requires_must_be_there():
    message = refused("image", video_requests, pipeline=SVDPipeline, prompt=None)
    assert message == "image is required by StableVideoDiffusionPipeline"


def test_a_model_of_pictures_makes_no_video_and_the_other_way_round():
    assert "makes images, it cannot make videos" in refused("model", video_requests, pipeline=FluxPipeline)
    assert "makes videos, it cannot make images" in refused("model", image_requests, pipeline=WanPipeline)


def test_another_model_than_the_served_one_is_not_found():
    assert "'other' is not served here, 'tiny' is" in refused("model", error=ModelNotFoundError, model="other")
    assert len(image_requests(model="tiny")) == 1


def test_a_background_that_the_model_cannot_make_is_refused():
    for value in (None, "auto", "opaque"):
        assert image_requests(seed=1, background=value) == image_requests(seed=1)
    message = refused("background", error=NotSupportedError, background="transparent")
    assert "'transparent'" in message
    assert "'auto'" in message


# --- extra_args ---


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"promt_2": "x"}, "FluxPipeline has no argument 'promt_2': did you mean 'prompt_2'?"),
        ({"width": 64}, "use the field 'size'"),
        ({"num_images_per_prompt": 2}, "use the field 'n'"),
        ({"guidance_scale": 2}, "use the field 'guidance_scale'"),
        ({"latents": [1]}, "cannot be sent"),
        ({"prompt_embeds": [1]}, "cannot be sent"),
        ({"callback_on_step_end": "x"}, "cannot be sent"),
        ({"generator": 1}, "cannot be sent"),
        ({"output_type": "latent"}, "has no argument 'output_type'"),
        ({"prompt_2": "x" * 20_001}, "at most 20000 characters"),
        ({"sigmas": [0.5] * 201}, "at most 200 entries"),
    ],
)
def test_extra_args_are_plain_arguments_of_the_pipeline_only(extra, says):
    [name] = extra
    assert says in refused(f"extra_args.{name}", extra_args=extra)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"guidance_rescale": "much"}, "must be a number, got 'much'"),
        ({"decode_timestep": True}, "must be a number or a list of which each is a number, got True"),
    ],
)
def test_extra_args_must_be_of_the_type_of_their_annotation(extra, says):
    [name] = extra
    assert says in refused(f"extra_args.{name}", video_requests, pipeline=LTXPipeline, extra_args=extra)
    [request] = video_requests(LTXPipeline, extra_args={"guidance_rescale": 1, "decode_timestep": [0.1]})
    assert request.arguments["decode_timestep"] == [0.1]


# --- videos ---


def test_seconds_become_frames_at_the_asked_rate():
    [request] = video_requests(seconds="4", fps=8, size="64x64")
    assert request.arguments["num_frames"] == 32
    assert "fps" not in request.arguments  # WanPipeline has no such argument
    assert request.output == OutputFormat("video", "mp4", fps=8.0)


def test_seconds_without_a_rate_use_that_of_the_pipeline():
    [request] = video_requests(LTXPipeline, seconds=2)
    assert request.arguments["num_frames"] == 50  # 25: LTXPipeline.__call__
    assert request.output.fps == 25.0
    [request] = video_requests(WanPipeline, seconds=2)
    assert request.arguments["num_frames"] == round(2 * (request.output.fps or 16))


def test_a_rate_reaches_pipelines_that_condition_on_it():
    [request] = video_requests(LTXPipeline, fps=12.5)
    assert request.arguments["frame_rate"] == 12.5
    [request] = video_requests(SVDPipeline, prompt=None, image=PNG_TEXT, fps=6.0)
    assert request.arguments["fps"] == 6
    assert isinstance(request.arguments["fps"], int)


def test_a_video_without_a_length_has_that_of_the_pipeline():
    [request] = video_requests()
    assert "num_frames" not in request.arguments
    assert request.output == OutputFormat("video", "mp4")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"num_frames": 258}, "num_frames", "at most 257 frames, got 258"),
        ({"seconds": 20, "fps": 16}, "seconds", "at most 257 frames, got 320"),
        ({"seconds": 1, "num_frames": 5}, "seconds", "not both"),
    ],
)
def test_a_length_that_cannot_be_made_is_refused(fields, param, says):
    assert says in refused(param, video_requests, **fields)


# --- pictures sent along ---


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_picture_may_come_as_a_data_url_as_base64_or_as_bytes(format):
    data = file_of(format)
    text = base64.b64encode(data).decode()
    for value in (data, text, f"data:image/{format.lower()};base64,{text}", {"image_url": text}, [text]):
        [request] = image_requests(StableDiffusionImg2ImgPipeline, image=value, strength=0.5)
        assert request.arguments["image"] == InputImage(data)
        assert request.arguments["strength"] == 0.5


def test_openais_name_for_the_first_picture_of_a_video_is_understood():
    [request] = video_requests(SVDPipeline, prompt=None, input_reference=PNG_TEXT)
    assert request.arguments["image"] == InputImage(PNG)


def test_several_pictures_stay_a_list_up_to_the_limit():
    make = StableDiffusionImg2ImgPipeline
    [request] = image_requests(make, image=[PNG_TEXT, PNG_TEXT])
    assert request.arguments["image"] == [InputImage(PNG), InputImage(PNG)]
    assert "at most 16 pictures, got 17" in refused("image", pipeline=make, image=[PNG_TEXT] * 17)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("not base64!", "base64"),
        ("ä", "base64"),
        (base64.b64encode(b"%PDF-1.7").decode(), "PNG, JPEG, WebP"),
        (7, "PNG, JPEG, WebP"),
        ({}, "PNG, JPEG, WebP"),
        ([PNG_TEXT, "data:,"], "PNG, JPEG, WebP"),
    ],
)
def test_what_is_no_picture_is_refused_at_the_door(value, says):
    with pytest.raises(ValidationError, match=says):
        ImageGenerationBody.model_validate({"prompt": "x", "image": value})


def test_a_picture_that_was_not_fetched_goes_no_further():
    for given in ("https://example.com/x.png", [PNG_TEXT, "http://example.com/y.png"]):
        assert "not fetched" in refused("image", pipeline=StableDiffusionImg2ImgPipeline, image=given)


# --- the body itself ---


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"n": 1.5},
        {"size": "512"},
        {"size": "0x512"},
        {"size": "512x512\n"},
        {"size": "-16x16"},
        {"num_inference_steps": 0},
        {"guidance_scale": -1},
        {"guidance_scale": float("nan")},
        {"guidance_scale": "strong"},
        {"strength": 1.1},
        {"seed": -1},
        {"seed": 2**62},
        {"output_format": "svg"},
        {"output_compression": 101},
        {"response_format": "file"},
        {"prompt": ["a"]},
        {"prompt": "\ud800"},
        {"negative_prompt": "\udfff"},
        {"extra_args": {"prompt_2": ["\ud83d"]}},
        {"extra_args": "x"},
        {"extra_args": {"x": float("inf")}},
    ],
)
def test_values_outside_a_fields_range_are_refused_with_the_field(fields):
    [name] = fields
    with pytest.raises(ValidationError) as caught:
        ImageGenerationBody.model_validate({"prompt": "x"} | fields)
    assert {error["loc"][0] for error in caught.value.errors()} == {name}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("width", "use 'size'"),
        ("steps", "use 'num_inference_steps'"),
    ],
)
def test_a_field_that_has_another_name_is_refused_with_it(name, hint):
    with pytest.raises(ValidationError) as caught:
        ImageGenerationBody.model_validate({"prompt": "x", name: 1})
    [problem] = caught.value.errors()
    assert problem["ctx"]["field"] == name
    assert f"unknown field {name!r}: {hint}" in problem["msg"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("promt", "did you mean 'prompt'?"),
        ("guidence_scale", "did you mean 'guidance_scale'?"),
        ("ip_adapter_imag", "did you mean 'ip_adapter_image'?"),
        ("num_frames", "known are prompt, model, n,"),
    ],
)
def test_a_field_that_is_no_argument_of_the_model_is_refused_with_the_closest_name(name, hint):
    assert f"unknown field {name!r}: {hint}" in refused(name, **{name: 1})


def test_form_fields_arrive_as_text_and_are_read_as_numbers():
    [request] = video_requests(num_frames="5", guidance_scale="1.5", seed="3")
    assert request.arguments["num_frames"] == 5
    assert request.arguments["guidance_scale"] == 1.5
    assert request.seed == 3


# --- answers ---


def made(num_frames: int = 1, fps: float | None = None) -> list[Media]:
    return [Media((MediaFile(b"x", "image/png", 64, 32, num_frames, fps),), {"decode": 0.5})]


def requested(kind: Any = "image", format: Any = "png") -> list[GenerationRequest]:
    return [GenerationRequest("r", "tiny", {}, 3, OutputFormat(kind, format))]


def test_the_openai_client_reads_the_answer():
    items = [GeneratedItem(b64_json="eA==", seed=3), GeneratedItem(url="https://x/1.png", seed=4)]
    answer = answer_of("image", items, requested(), made()).model_dump(mode="json")
    read = openai.types.ImagesResponse.model_validate(answer, strict=True)
    assert read.data is not None
    assert (read.data[0].b64_json, read.data[1].url) == ("eA==", "https://x/1.png")
    assert (read.output_format, answer["size"], answer["model"]) == ("png", "64x32", "tiny")
    assert answer["data"][0]["seed"] == 3
    assert answer["timings"] == [{"decode": 0.5}]


def test_the_answer_with_a_video_says_how_long_it_is():
    answer = answer_of("video", [GeneratedItem(url="/v", seed=3)], requested("video", "mp4"), made(9, 8.0))
    assert (answer.num_frames, answer.fps, answer.output_format, answer.size) == (9, 8.0, "mp4", "64x32")


def test_the_openai_client_reads_the_list_of_models():
    listed = ModelList(data=[ModelCard(id="tiny", created=1, state="ready")]).model_dump()
    assert listed["object"] == "list"
    assert openai.types.Model.model_validate(listed["data"][0], strict=True).id == "tiny"


def test_characters_beyond_the_first_plane_are_no_halves():
    [request] = image_requests(prompt="🦊 \\ud800 狐", extra_args={"prompt_2": "🦊"})
    assert request.arguments["prompt"] == "🦊 \\ud800 狐"


# --- how a request is run ---


@pytest.mark.parametrize(
    ("fields", "cache_dit"),
    [
        ({}, None),
        (
            {"cache_dit": {"enable": True, "residual_diff_threshold": 0.1}},
            {"enable": True, "residual_diff_threshold": 0.1},
        ),
        ({"enable_cache_dit": False}, {"enable": False}),
        ({"cache_dit_params": {"scm_preset": "fast"}}, {"scm_preset": "fast"}),
        (
            {"enable_cache_dit": True, "cache_dit_params": {"Fn_compute_blocks": 4}},
            {"enable": True, "Fn_compute_blocks": 4},
        ),
    ],
)
def test_cache_dit_is_taken_in_our_words_and_in_sglangs(fields: dict[str, Any], cache_dit: Any) -> None:
    for request in image_requests(prompt="cat", n=2, **fields):
        assert request.features.get("cache_dit") == cache_dit


def test_a_feature_without_a_field_is_asked_for_in_extra_args_where_the_model_has_it() -> None:
    body = ImageGenerationBody.model_validate({"prompt": "a fox", "extra_args": {"planted": {"strength": 2}}})
    with_it = dataclasses.replace(description_of(FluxPipeline), features=("cache_dit", "planted"))
    [request] = to_generation_requests(body, with_it, LIMITS, "r", "tiny")
    assert request.features == {"planted": {"strength": 2}}
    assert "planted" not in request.arguments
    assert "has no argument 'planted'" in refused("extra_args.planted", extra_args={"planted": 1})
    assert "use the field 'cache_dit'" in refused("extra_args.cache_dit", extra_args={"cache_dit": {}})


def test_cache_dit_in_both_words_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequestError, match="give cache_dit or enable_cache_dit, not both") as refusal:
        image_requests(prompt="cat", cache_dit={}, enable_cache_dit=True)
    assert refusal.value.param == "enable_cache_dit"


def test_determinism_and_deadline_reach_the_request() -> None:
    [usual] = image_requests(prompt="cat")
    assert (usual.deterministic, usual.deadline_s) == (False, None)
    [urgent] = image_requests(prompt="cat", deterministic=True, deadline_s=2.5)
    assert (urgent.deterministic, urgent.deadline_s) == (True, 2.5)
    for deadline_s in (0, -1):
        with pytest.raises(ValidationError, match="deadline_s"):
            image_requests(prompt="cat", deadline_s=deadline_s)
