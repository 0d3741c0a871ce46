"""Arguments that change nothing, as the door learns of them: refused or dropped, and asked about once for each kind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.messages import Effects, GenerationRequest, OutputFormat
from serve_app.deadlines import NO_LIMITS, TimeLimits
from serve_app.requests import effects
from serve_app.requests.bodies import ImageGenerationBody
from serve_app.requests.effects import KnownEffects, kind_of
from tests.support.in_process import Server, serving

IMAGES = "/v1/images/generations"
WITHOUT = Effects({"negative_prompt": "it matters with true_cfg_scale=5"}, num_steps=3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "outputs") as server:
        yield server


async def test_an_argument_that_cannot_matter_is_refused_and_says_with_what_it_would(server: Server) -> None:
    server.handle.known_effects = WITHOUT
    answer = await server.post(IMAGES, json={"prompt": "x", "negative_prompt": "rain"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("negative_prompt", "not_supported")
    assert "no effect on FluxPipeline" in error["message"]
    assert "it matters with true_cfg_scale=5" in error["message"]


async def test_without_strict_it_is_dropped_and_named(server: Server) -> None:
    server.handle.known_effects = WITHOUT
    answer = await server.post(IMAGES, json={"prompt": "x", "negative_prompt": "rain", "strict": False})
    assert answer.status_code == 200
    assert [(each["code"], each["param"]) for each in answer.json()["warnings"]] == [("no_effect", "negative_prompt")]
    [request] = server.requests
    assert "negative_prompt" not in request.arguments


async def test_a_size_without_effect_is_named_once_by_its_field(server: Server) -> None:
    server.handle.known_effects = Effects({"width": "this model does not read it", "height": "this model does not"})
    answer = await server.post(IMAGES, json={"prompt": "x", "size": "64x64", "strict": False})
    assert [each["param"] for each in answer.json()["warnings"]] == ["size"]


async def test_an_argument_of_the_application_is_no_fault_of_the_caller(server: Server) -> None:
    server.configure(default_arguments={"negative_prompt": "rain"})
    server.handle.known_effects = WITHOUT
    answer = await server.post(IMAGES, json={"prompt": "x"})
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])


async def test_the_encoder_is_asked_once_for_each_kind_of_request(server: Server) -> None:
    for prompt, scale in (("a", 5.0), ("b", 7.5), ("c", 1.0), ("d", 1.0)):
        answer = await server.post(IMAGES, json={"prompt": prompt, "guidance_scale": scale})
        assert answer.status_code == 200
    assert server.handle.questions == [("guidance_scale",)] * 2


async def test_an_encoder_that_is_lost_refuses_nobody_but_the_answer_says_so(server: Server) -> None:
    async def lost(*_: Any) -> Effects:
        raise ConnectionError("the replica died")

    server.handle.effects.remote = lost
    answer = await server.post(IMAGES, json={"prompt": "x", "guidance_scale": 2})
    assert answer.status_code == 200
    assert [each["code"] for each in answer.json()["warnings"]] == ["not_checked"]


class Encoder:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, *_: Any) -> Effects:
        await self.go.wait()
        return WITHOUT


async def test_requests_wait_for_what_is_left_of_the_time_since_the_first_of_their_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = GenerationRequest("r", "m", {"prompt": "x"}, 0, OutputFormat("image", "png"))
    encoder = Encoder()
    known = KnownEffects(encoder)
    monkeypatch.setattr(effects, "TIMEOUT_S", 0.01)
    assert await known.of(request, ()) is None
    monkeypatch.setattr(effects, "TIMEOUT_S", 60)
    async with asyncio.timeout(20):
        assert await known.of(request, ()) is None
    encoder.go.set()
    await asyncio.sleep(0.01)
    assert await known.of(request, ()) is WITHOUT


@pytest.mark.parametrize(
    ("limits", "deadline_s"),
    [(TimeLimits(total_s=0.01), None), (TimeLimits(start_s=0.01), None), (NO_LIMITS, 0.01)],
)
async def test_a_request_waits_no_longer_than_it_may_take(
    server: Server, monkeypatch: pytest.MonkeyPatch, limits: TimeLimits, deadline_s: float | None
) -> None:
    monkeypatch.setattr(effects, "TIMEOUT_S", 60)
    server.handle.effects.remote = Encoder()
    await server.open()
    body = ImageGenerationBody(prompt="x", guidance_scale=2, deadline_s=deadline_s)
    async with asyncio.timeout(20):
        [request] = await server.model.parse(body, "caller", limits=limits)
    assert [each.code for each in request.warnings] == ["not_checked"]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"guidance_scale": 5.0}, {"guidance_scale": 7.5}, True),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.5}, False),
        ({"strength": 0.5}, {"strength": 0.6}, False),
        ({"num_inference_steps": 4}, {"num_inference_steps": 5}, False),
        ({"prompt": "a"}, {"prompt": "b"}, True),
        ({"negative_prompt": ""}, {"negative_prompt": "b"}, False),
        ({"sigmas": [1.0, 0.5]}, {"sigmas": [1.0, 0.4]}, False),
        ({"width": 64}, {"width": 128}, True),
        ({"width": 64}, {}, False),
    ],
)
def test_requests_are_of_one_kind_where_the_same_can_matter(
    one: dict[str, Any], other: dict[str, Any], is_same: bool
) -> None:
    assert (kind_of(one, tuple(one)) == kind_of(other, tuple(one))) is is_same


async def test_a_model_tells_the_arguments_that_it_reads_and_where_they_go(server: Server) -> None:
    server.configure(default_arguments={"guidance_scale": 2.0}, quality={"low": {"num_inference_steps": 1}})
    async with server.client() as client:
        model = (await client.get("/v1/models/flux")).json()
    arguments = {each["name"]: each for each in model["arguments"]}
    assert arguments["guidance_scale"] == {
        "name": "guidance_scale", "field": "guidance_scale", "type": "any", "default": 2.0, "when": "always",
        "required": False, "media": None, "accepts": {"minimum": 0}, "description": "",
    }  # fmt: skip
    assert arguments["width"]["field"] == "size"
    assert model["quality"] == ["low"]
