"""What was asked for before, asked again of another model or under other limits: checked as what is new."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import InvalidRequestError
from deployments.messages import GenerationRequest, InputImage, OutputFormat, StageDescription, ValueType
from serve_app.requests.given.earlier_requests import check_taken, check_within
from serve_app.requests.limits import RequestLimits
from tests.support.in_process import TEXT_TO_IMAGE, Server, description, picture, serving

WAN = description(
    "WanPipeline", "num_frames", "flow_shift", media_kind="video", tasks=("text_to_video",), takes_adapters=True
)
LTX = dataclasses.replace(WAN, pipeline_class="LTXPipeline")
ASKED = {"prompt": "a fox", "size": "64x48", "num_frames": 9, "num_inference_steps": 20, "flow_shift": 3, "n": 2}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "out") as server:
        yield server


def without(name: str) -> StageDescription:
    return dataclasses.replace(LTX, parameters={each: LTX.parameters[each] for each in LTX.parameters if each != name})


async def test_a_remix_by_another_model_or_under_other_limits_is_checked_as_a_new_request(server: Server) -> None:
    server.configure(several={"wan": WAN}, models={"wan": {"adapters": {"neon": "a.safetensors"}}})
    video = (await server.post("/v1/videos", json=ASKED | {"loras": [{"name": "neon", "scale": 5}]})).json()
    plain = (await server.post("/v1/videos", json=ASKED)).json()

    async def remixed(served: StageDescription, name: str = "ltx", id: str = plain["id"], **settings: Any) -> Any:
        server.configure(several={name: served}, models={name: settings})
        answer = await server.post(f"/v1/videos/{id}/remix", json={"prompt": "a dog"})
        error = answer.json().get("error") or {}
        return answer.status_code, error.get("code"), error.get("param")

    for name in ("ltx", "wan"):
        for limits, param in (
            ({"max_frames": 5}, "num_frames"),
            ({"max_pixels": 3000}, "size"),
            ({"max_side": 48}, "size"),
            ({"max_steps": 10}, "num_inference_steps"),
            ({"max_images": 1}, "n"),
        ):
            assert await remixed(LTX, name, limits=limits) == (400, "limit_exceeded", param)
    assert (await remixed(dataclasses.replace(LTX, size_multiple=32)))[::2] == (400, "size")
    for gone, field in (("num_frames", "num_frames"), ("width", "size"), ("flow_shift", "flow_shift")):
        assert await remixed(without(gone)) == (400, "not_supported", field)
    needing = dataclasses.replace(LTX, parameters=LTX.parameters | {"image": None}, required=("image",))
    assert await remixed(needing) == (400, "missing_required_parameter", "image")
    of_choices = {"flow_shift": ValueType("choice", choices=(1, 5))}
    assert (await remixed(dataclasses.replace(LTX, argument_types=of_choices)))[::2] == (400, "flow_shift")
    assert await remixed(TEXT_TO_IMAGE, "flux") == (404, "model_not_found", "model")
    neon = {"adapters": {"neon": "a.safetensors"}}
    assert await remixed(LTX, id=video["id"]) == (404, "lora_not_found", "loras")
    assert await remixed(LTX, id=video["id"], **neon, limits={"max_lora_scale": 2}) == (400, "limit_exceeded", "loras")
    assert await remixed(LTX, id=video["id"], **neon, limits={"max_loras": 0}) == (400, "limit_exceeded", "loras")
    untaking = dataclasses.replace(LTX, takes_adapters=False)
    assert await remixed(untaking, id=video["id"]) == (400, "not_supported", "loras")
    assert await remixed(LTX) == (200, None, None)
    # What is configured for the model is its own, whatever the limits are.
    assert await remixed(LTX, limits={"max_steps": 10}, default_arguments={"num_inference_steps": 20}) == (
        200, None, None,
    )  # fmt: skip


OWN_RATE = dataclasses.replace(
    WAN,
    parameters=WAN.parameters | {"num_inference_steps": 50, "frame_rate": 24, "image": None, "scales": None},
    argument_types={"frame_rate": ValueType("int"), "num_frames": ValueType("int")},
)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"num_inference_steps": 30},
        {"fps": 12},
        {"fps": 12.5},
        {"seconds": 0.5, "fps": 8},
        {"size": "64x48", "num_frames": 9},
        {"flow_shift": 3, "scales": [1, 2], "n": 2, "negative_prompt": "rain"},
        {"image": base64.b64encode(picture(64, 64)).decode()},
        {"quality": "low"},
    ],
)
async def test_a_model_remixes_whatever_it_has_taken_under_the_same_limits(
    server: Server, body: dict[str, Any]
) -> None:
    # The pipeline's own 50 steps, and the 60 that are configured for a level, are above the limit.
    settings = {"limits": {"max_steps": 30}, "quality": {"low": {"num_inference_steps": 60}}}
    server.configure(several={"wan": OWN_RATE}, models={"wan": settings})
    taken = await server.post("/v1/videos", json={"prompt": "a fox"} | body)
    assert taken.status_code == 200, taken.text
    remix = await server.post(f"/v1/videos/{taken.json()['id']}/remix", json={"prompt": "a dog"})
    assert remix.status_code == 200, remix.text


@pytest.mark.parametrize(
    ("body", "param"), [({"num_inference_steps": 50}, "num_inference_steps"), ({"num_frames": 258}, "num_frames")]
)
async def test_what_a_remix_would_refuse_is_refused_at_the_door(
    server: Server, body: dict[str, Any], param: str
) -> None:
    server.configure(several={"wan": OWN_RATE}, models={"wan": {"limits": {"max_steps": 30}}})
    refused = await server.post("/v1/videos", json={"prompt": "a fox"} | body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_frames_that_were_written_here_are_not_held_against_the_bytes_of_what_callers_send() -> None:
    served = dataclasses.replace(WAN, parameters=WAN.parameters | {"video": None})
    check_within(earlier(video=[InputImage(picture())]), served, RequestLimits(max_input_bytes=20), ())


async def test_a_remix_by_a_model_that_takes_no_steps_says_that_they_have_no_effect(server: Server) -> None:
    server.configure(several={"wan": WAN})
    video = (await server.post("/v1/videos", json=ASKED)).json()
    server.configure(several={"ltx": without("num_inference_steps")})
    remix = (await server.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a dog"})).json()
    assert [each["param"] for each in remix["warnings"]] == ["num_inference_steps"]


async def test_another_model_remixes_a_video_whose_own_makes_pictures_now(server: Server) -> None:
    server.configure(several={"wan": WAN})
    video = (await server.post("/v1/videos", json=ASKED)).json()
    server.configure(several={"wan": TEXT_TO_IMAGE, "ltx": LTX})
    remix = (await server.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a dog"})).json()
    assert remix["model"] == "ltx"


async def test_the_jobs_of_a_model_are_found_by_its_name_with_a_lora(server: Server) -> None:
    server.configure(several={"wan": WAN}, aliases={"sora-2": "wan"})
    video = (await server.post("/v1/videos", json=ASKED)).json()
    async with server.client() as client:
        for name, found in (("wan:neon", [video["id"]]), ("sora-2:neon", [video["id"]]), ("ltx:neon", [])):
            jobs = (await client.get("/v1/jobs", params={"model": name})).json()
            assert [each["id"] for each in jobs["data"]] == found


def earlier(**arguments: Any) -> GenerationRequest:
    return GenerationRequest("video_1", "wan", {"prompt": "x"} | arguments, 7, OutputFormat("video", "mp4"))


@pytest.mark.parametrize(
    ("arguments", "limits", "param"),
    [
        ({"negative_prompt": "x" * 11}, {"max_prompt_chars": 10}, "negative_prompt"),
        ({"image": InputImage(picture(64, 64))}, {"max_input_pixels": 1000}, "image"),
        ({"image": [InputImage(picture())] * 3}, {"max_input_images": 2}, "image"),
        ({"video": [InputImage(picture())] * 3}, {"max_frames": 2}, "video"),
        ({"conditions": [{"image": InputImage(picture())}]}, {"max_input_bytes": 20}, "conditions"),
        ({"max_sequence_length": 512}, {"max_prompt_tokens": 256}, "max_sequence_length"),
        ({"sigmas": [1.0] * 30}, {"max_steps": 20}, "sigmas"),
    ],
)
def test_every_value_of_an_earlier_request_is_within_the_limits_of_today(
    arguments: dict[str, Any], limits: dict[str, int], param: str
) -> None:
    served = dataclasses.replace(WAN, parameters=WAN.parameters | dict.fromkeys(arguments))
    check_taken(earlier(**arguments), served, ())
    check_within(earlier(**arguments), served, RequestLimits(), ())
    with pytest.raises(InvalidRequestError) as refused:
        check_within(earlier(**arguments), served, RequestLimits.model_validate(limits), ())
    assert refused.value.param == param
    check_within(earlier(**arguments), served, RequestLimits.model_validate(limits), [arguments])
