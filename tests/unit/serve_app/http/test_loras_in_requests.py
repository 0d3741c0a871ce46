"""LoRAs in a request: `loras` and `model: "flux:sketch"`, in JSON, forms and through OpenAI's client."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest

from deployments.adapters.use import named
from deployments.errors import InvalidRequestError
from serve_app.jobs import runner
from serve_app.making.layers.digest import work_digest
from tests.support.in_process import Server, description, picture, serving
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import make_video

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PIPELINE = ("image", "cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
FLUX = description("FluxKontextPipeline", *PIPELINE, takes_adapters=True, features=("loras", "cache_dit"))
WAN = description("WanPipeline", "num_frames", media_kind="video", frame_multiple=4, takes_adapters=True)
SOUND = description("AudioPipeline", media_kind="audio", takes_adapters=True)
ADAPTERS: dict[str, Any] = {
    "sketch": {"path": "/srv/sketch.safetensors", "scale": 0.6},
    "neon": "/srv/neon.safetensors",
    "glow": {"path": "owner/glow", "weight_name": "glow.safetensors"},
}
PNG = ("a.png", picture())
AS_JSON = {"content-type": "application/json"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "out") as server:
        server.configure(FLUX, adapters=ADAPTERS, model_aliases=("gpt-image-1",))
        yield server


def client_of(server: Server) -> openai.AsyncOpenAI:
    http_client = openai.DefaultAsyncHttpxClient(transport=httpx2.ASGITransport(server))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http_client)


async def ask(server: Server, **body: Any) -> httpx.Response:
    return await server.post(GENERATIONS, json={"prompt": "a fox", **body})


def asked(server: Server) -> list[tuple[str, Any]]:
    """The name and scale of each LoRA of the last request."""
    return [(each["name"], each["scale"]) for each in server.requests[-1].features.get("loras", [])]


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


NAMED: list[tuple[dict[str, Any], Any]] = [
    ({}, []),
    ({"loras": []}, []),
    ({"loras": None}, []),
    ({"loras": [{"name": "sketch", "scale": 0.8}]}, [("sketch", 0.8)]),
    ({"loras": [{"name": "sketch"}]}, [("sketch", 0.6)]),
    ({"loras": [{"name": "sketch", "scale": None}]}, [("sketch", 0.6)]),
    ({"loras": [{"name": "sketch", "scale": 0}, {"name": "neon", "scale": -1}]}, [("sketch", 0), ("neon", -1)]),
    ({"loras": ["neon", "glow"]}, [("neon", 1), ("glow", 1)]),
    ({"loras": {"name": "neon"}}, [("neon", 1)]),
    (
        {"loras": [{"name": "neon", "scale": {"transformer": 0.8, "text_encoder": 0}}]},
        [("neon", {"transformer": 0.8, "text_encoder": 0})],
    ),
    ({"model": "flux:sketch"}, [("sketch", 0.6)]),
    ({"model": "gpt-image-1:sketch"}, [("sketch", 0.6)]),
    ({"model": "flux:sketch", "loras": [{"name": "neon", "scale": 2}]}, [("sketch", 0.6), ("neon", 2)]),
    ({"extra_body": {"loras": [{"name": "neon"}]}}, [("neon", 1)]),
]


async def test_a_request_names_its_loras(server: Server) -> None:
    for body, uses in NAMED:
        answer = await ask(server, **body)
        assert answer.status_code == 200, answer.text
        assert asked(server) == uses


async def test_the_stages_are_told_the_place_and_what_is_known_of_the_file(server: Server) -> None:
    await ask(server, loras=["glow"])
    assert server.requests[-1].features["loras"] == [
        {
            "name": "glow",
            "path": "owner/glow",
            "weight_name": "glow.safetensors",
            "component": None,
            "scale": 1.0,
            "digest": "",
        }
    ]
    await ask(server, loras=["glow"])
    assert len(server.requests[-1].features["loras"][0]["digest"]) == 64
    assert len(server.handle.adapters.read) == 1


FORMS: list[dict[str, Any]] = [
    {"loras": json.dumps([{"name": "sketch", "scale": 0.5}, {"name": "neon"}])},
    {"loras[0][name]": "sketch", "loras[0][scale]": "0.5", "loras[1][name]": "neon"},
    {"loras[][name]": ["sketch", "neon"], "loras[][scale]": ["0.5", "1"]},
]


async def test_forms_say_the_same(server: Server) -> None:
    for form in FORMS:
        fields = [
            (name, each) for name, value in form.items() for each in (value if isinstance(value, list) else [value])
        ]
        files: list[Any] = [*((name, (None, value)) for name, value in fields), ("prompt", (None, "x")), ("image", PNG)]
        answer = await server.post(EDITS, files=files)
        assert answer.status_code == 200, answer.text
        assert asked(server) == [("sketch", 0.5), ("neon", 1)]


async def test_a_form_names_one_as_plain_text_or_several(server: Server) -> None:
    for names in (["neon"], ["neon", "glow"]):
        files: list[Any] = [*(("loras", (None, name)) for name in names), ("prompt", (None, "x")), ("image", PNG)]
        assert (await server.post(EDITS, files=files)).status_code == 200
        assert [name for name, _ in asked(server)] == names


async def test_openais_client_sends_them_in_every_shape_that_it_has(server: Server) -> None:
    client = client_of(server)
    loras = [{"name": "sketch", "scale": 0.8}, {"name": "neon", "scale": {"transformer": 0.5, "text_encoder": 0}}]
    wanted = [("sketch", 0.8), ("neon", {"transformer": 0.5, "text_encoder": 0})]
    await client.images.generate(prompt="a fox", model="flux", extra_body={"loras": loras})
    assert asked(server) == wanted
    for alike in (loras[:1], loras[1:], [{"name": "sketch", "scale": 0.8}, {"name": "neon", "scale": 0}]):
        await client.images.edit(prompt="a fox", image=PNG, model="flux:glow", extra_body={"loras": alike})
        assert asked(server) == [("glow", 1), *((each["name"], each["scale"]) for each in alike)]
    # The client's form does not say whose the scales are: nothing is guessed.
    with pytest.raises(openai.BadRequestError, match="send loras as JSON text"):
        await client.images.edit(prompt="a fox", image=PNG, extra_body={"loras": loras})
    await client.images.edit(prompt="a fox", image=PNG, extra_body={"loras": json.dumps(loras)})
    assert asked(server) == wanted
    await client.images.generate(prompt="a fox", model="flux:sketch")
    assert asked(server) == [("sketch", 0.6)]
    with pytest.raises(openai.NotFoundError, match="there are sketch, neon, glow"):
        await client.images.generate(prompt="a fox", model="flux", extra_body={"loras": [{"name": "pencil"}]})


async def test_sound_names_them_too(server: Server) -> None:
    server.configure(SOUND, adapters=ADAPTERS)
    await server.post("/v1/audio/generations", json={"prompt": "rain", "loras": ["neon"]})
    assert asked(server) == [("neon", 1)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_a_job_of_a_video_carries_them_and_a_remix_names_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "a.safetensors").touch()
    places = (str(tmp_path / "loras"),)
    async with server_with_jobs(tmp_path / "out", describing=WAN, adapters=ADAPTERS, adapter_places=places) as (
        server, client,
    ):  # fmt: skip
        server.make = make_video
        await client.post("/v1/loras", json={"name": "added", "path": "a.safetensors"})
        loras = [{"name": "added", "scale": 0.5}, {"name": "neon", "scale": 2}]
        video = await client_of(server).videos.create(prompt="a fox", model="flux:sketch", extra_body={"loras": loras})
        assert (await ended(client, video.id))["status"] == "completed"
        wanted = [("sketch", 0.6), ("added", 0.5), ("neon", 2)]
        assert asked(server) == wanted
        remix = await client.post(f"/v1/videos/{video.id}/remix", json={"prompt": "a cat"})
        await ended(client, remix.json()["id"])
        assert asked(server) == wanted
        await client.delete("/v1/loras/added")
        gone = await client.post(f"/v1/videos/{video.id}/remix", json={"prompt": "a dog"})
        assert error_of(gone) == (404, "lora_not_found", "loras")


async def test_a_key_stands_for_the_loras_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    async with server_with_jobs(tmp_path / "out", describing=FLUX, adapters=ADAPTERS) as (_, client):
        for body, status in (({"loras": ["neon"]}, 200), ({"loras": ["neon"]}, 200), ({"loras": ["glow"]}, 409)):
            answer = await client.post(GENERATIONS, json={"prompt": "x"} | body, headers={"Idempotency-Key": "k"})
            assert answer.status_code == status, answer.text


async def test_requests_that_differ_in_a_lora_are_different_work_and_files_name_them(server: Server) -> None:
    for loras in ([], ["neon"], [{"name": "neon", "scale": 0.5}], ["glow"]):
        await ask(server, loras=loras, seed=1)
    assert len({work_digest(dataclasses.replace(each, request_id="")) for each in server.requests}) == 4
    [told] = named(server.requests[2].features)
    assert (told["name"], told["scale"], "path" in told) == ("neon", 0.5, False)


DEEP: Any = 1
for _ in range(40):
    DEEP = {"transformer": DEEP}
HOSTILE: list[Any] = [
    5, True, [5], [None], [[]], [{}], [{"name": ""}], [{"name": 5}], [{"name": "neon", "path": "/etc/passwd"}],
    [{"name": "neon", "weight": 1}], [{"name": "n" * 10_000}], "[", "{", "[" * 5000, [{"name": "neon\0"}],
    *([{"name": "neon", "scale": scale}] for scale in (
        True, "1", [], [1], {}, {"transformer": True}, {"transformer": "1"}, {"transformer": None}, DEEP, 11, -11,
        1e300, 10**400, {"transformer": 11}, {"vae": 1}, {"transformer": 1, "unet": 1}, {str(n): 1 for n in range(100)},
        {"": 1}, {"transformer.blocks": 1},
    )),
    [{"name": "neon"}] * 2, ["neon", {"name": "neon", "scale": 2}], [{"name": f"n{n}"} for n in range(100)],
]  # fmt: skip


async def test_what_is_no_list_of_loras_is_refused_by_its_name(server: Server) -> None:
    for loras in HOSTILE:
        answer = await ask(server, loras=loras)
        status, code, param = error_of(answer)
        assert (status, param) == (400, "loras"), (loras, answer.text)
        assert code in ("invalid_value", "limit_exceeded", "missing_required_parameter")
        assert len(answer.text) < 1000
    assert server.requests == []


async def test_a_scale_that_is_no_number_is_refused(server: Server) -> None:
    for word in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000):
        for scale in (word, f'{{"transformer": {word}}}'):
            body = f'{{"prompt": "x", "loras": [{{"name": "neon", "scale": {scale}}}]}}'
            answer = await server.post(GENERATIONS, content=body, headers=AS_JSON)
            assert error_of(answer) == (400, "invalid_value", "loras"), scale[:60]


async def test_an_unknown_name_is_a_404_that_lists_what_is_there(server: Server) -> None:
    for name in ("pencil", "Neon", "nеon", "neon ", "../neon", "neon:glow", "n" * 128):
        answer = await ask(server, loras=[{"name": name}])
        assert error_of(answer) == (404, "lora_not_found", "loras")
        assert "there are sketch, neon, glow" in answer.json()["error"]["message"]
    half = '{"prompt": "x", "loras": [{"name": "\\ud800"}]}'
    answer = await server.post(GENERATIONS, content=half, headers=AS_JSON)
    assert error_of(answer) == (400, "invalid_value", "loras")


async def test_an_unknown_model_is_a_404(server: Server) -> None:
    for model in (
        "flux:pencil",
        "flux:",
        "other:sketch",
        "flux:sketch:neon",
        ":sketch",
        "sketch",
        "flux:" + "x" * 9999,
    ):
        answer = await ask(server, model=model)
        assert error_of(answer) == (404, "model_not_found", "model")
        assert len(answer.text) < 1000


async def test_one_that_is_named_in_both_places_is_refused(server: Server) -> None:
    answer = await ask(server, model="flux:sketch", loras=["sketch"])
    assert error_of(answer) == (400, "invalid_value", "loras")
    assert "loras and model: 'sketch' is named twice" in answer.text


async def test_two_names_of_one_file_are_refused_as_soon_as_that_is_known(server: Server) -> None:
    for name in ("neon", "glow"):
        server.handle.adapters.found[ADAPTERS["glow"]["path"]] = {"digest": "1" * 64}
        server.handle.adapters.found[ADAPTERS["neon"]] = {"digest": "1" * 64}
        await ask(server, loras=[name])
    assert error_of(await ask(server, loras=["neon", "glow"])) == (400, "invalid_value", "loras")


async def test_the_scale_of_all_loras_is_refused_with_a_hint(server: Server) -> None:
    for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"):
        for body in ({name: {"scale": 0.5}}, {"extra_args": {name: {"scale": 0.5, "more": 1}}}):
            answer = await ask(server, loras=["neon"], **body)
            assert error_of(answer) == (400, "not_supported", name)
            assert "loras: [" in answer.json()["error"]["message"]
        assert (await ask(server, **{name: {"other": 1}})).status_code == 200


async def test_the_names_of_other_servers_are_refused_with_a_hint(server: Server) -> None:
    for name in ("lora", "lora_scale", "lora_weights", "lora_path", "adapter_name"):
        for body in ({name: 0.5}, {"extra_args": {name: 0.5}}):
            answer = await ask(server, **body)
            assert answer.status_code == 400
            assert "'loras'" in answer.json()["error"]["message"]


async def test_no_way_leads_past_the_field_to_a_place_of_the_callers_choice(server: Server) -> None:
    plain = {"name": "neon", "path": "/etc/passwd", "weight_name": None, "scale": 1, "digest": ""}
    for strict in (True, False):
        for where in ("extra_args", "extra_body"):
            answer = await ask(server, strict=strict, **{where: {"loras": [plain]}})
            assert answer.status_code == 400, answer.text
    assert server.requests == []


async def test_a_model_that_takes_none_refuses_them_or_drops_them_by_name(server: Server) -> None:
    server.configure(description("ToyPipeline"))
    assert error_of(await ask(server, loras=["neon"])) == (400, "not_supported", "loras")
    answer = await ask(server, loras=["neon"], strict=False)
    assert [each["param"] for each in answer.json()["warnings"]] == ["loras"]
    assert asked(server) == []


async def test_a_component_is_known_once_the_file_was_read_and_a_file_that_does_not_fit_is_said(server: Server) -> None:
    answer = await ask(server, loras=[{"name": "neon", "scale": {"text_encoder_2": 1}}])
    assert "'neon' changes transformer and text_encoder, not 'text_encoder_2'" in answer.json()["error"]["message"]
    server.handle.adapters.found["owner/glow"] = InvalidRequestError("owner/glow has layers of another model", "x")
    answer = await ask(server, loras=[{"name": "glow", "scale": {"transformer": 1}}])
    assert error_of(answer) == (400, "invalid_value", "loras")
    assert "owner/glow" not in answer.text


async def test_the_limits_are_those_of_the_configuration(server: Server) -> None:
    server.configure(FLUX, adapters=ADAPTERS, limits={"max_loras": 1, "max_lora_scale": 1})
    assert error_of(await ask(server, model="flux:neon", loras=["glow"])) == (400, "limit_exceeded", "loras")
    assert error_of(await ask(server, loras=[{"name": "neon", "scale": 1.1}])) == (400, "limit_exceeded", "loras")
    assert (await ask(server, loras=[{"name": "neon", "scale": -1}])).status_code == 200


async def test_pictures_sent_along_go_with_loras(server: Server) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    assert (await server.post(EDITS, json={"prompt": "x", "image": url, "loras": ["neon"]})).status_code == 200
    assert asked(server) == [("neon", 1)]
