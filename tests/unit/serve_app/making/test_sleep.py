"""A model that is asleep: what is told of it, what wakes it, and how its callers wait."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from deployments.messages import ArgumentDescription, ArgumentNotes, StageDescription, ValueType
from serve_app.http.playground.cluster import ClusterWatch
from serve_app.making.sleep import deployment_states
from serve_app.making.sleep.deployment_states import DeploymentStates, State, state_of
from serve_app.making.sleep.kept_facts import Facts, facts_from_json, facts_to_json
from serve_app.making.sleep.model_sleep import ModelSleep
from tests.support.in_process import TEXT_TO_IMAGE, Server, description, serving, until
from tests.support.jobs_in_process import ended
from tests.support.played_stages import Method
from tests.support.recorded_meter import RecordedMeter

IMAGES = "/v1/images/generations"
FOX = {"prompt": "a fox", "seed": 1}


class Sleeper:
    """The one model of a server, which a call of its stages wakes; it is loaded when `finish` is called."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.calls = 0  # of any stage, that would wake it
        self.loads = 0
        self.is_loaded = asyncio.Event()
        server.states = {"Played": "asleep"}
        server.meter = RecordedMeter()
        self.sleep()

    def sleep(self) -> None:
        assert self.server.states is not None
        self.server.states["Played"] = "asleep"
        self.is_loaded.clear()
        handle = self.server.handle
        for name in ("describe", "effects", "arguments", "inspect_adapter"):
            setattr(handle, name, Method(self.waking(getattr(handle, f"_{name}", None))))

    def waking(self, answer: Any) -> Any:
        async def call(*arguments: Any) -> Any:
            self.calls += 1
            assert self.server.states is not None
            if self.server.states["Played"] == "asleep":
                self.loads += 1
                self.server.states["Played"] = "waking"
            await self.is_loaded.wait()
            return await answer(*arguments)

        return call

    def finish(self) -> None:
        assert self.server.states is not None
        self.server.states["Played"] = "running"
        self.is_loaded.set()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "out") as server:
        yield server


@pytest.fixture
async def sleeper(server: Server) -> Sleeper:
    """Known by what it told before it slept."""
    server.facts.kept = Facts(TEXT_TO_IMAGE, (ArgumentDescription("prompt", "text", None, "always"),), None)
    return Sleeper(server)


async def get(server: Server, path: str) -> httpx.Response:
    async with server.client() as client:
        return await client.get(path)


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


# --- what does not wake it ---


async def test_nothing_that_is_only_asked_about_it_wakes_it(server: Server, sleeper: Sleeper) -> None:
    health = await get(server, "/health")
    assert (health.status_code, health.json()["models"], health.json()["missing"]) == (200, {"flux": "asleep"}, [])
    assert "asleep" in health.json()["stages"]["Played"]["detail"]
    [card] = (await get(server, "/v1/models")).json()["data"]
    assert (card["kind"], card["state"], card["load_s"]) == ("image", "asleep", None)
    details = (await get(server, "/v1/models/flux")).json()
    assert [each["name"] for each in details["arguments"]] == ["prompt"]
    assert (await get(server, "/model_info")).json()["architectures"] == ["FluxPipeline"]
    for path in ("/openapi.json", "/v1/loras", "/v1/jobs", "/"):
        assert (await get(server, path)).status_code == 200, path
    await server.service.tell()
    seen = await ClusterWatch(server.service.models, server.service.jobs).look()
    assert "asleep" in seen["deployments"][0]["trouble"]
    assert sleeper.calls == 0
    assert isinstance(server.meter, RecordedMeter)
    assert server.meter.stands_at["triptych_model_asleep"] == {("flux",): 1.0}
    assert server.meter.stands_at["triptych_stages_wanted"] == {("Played",): 0.0}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "a fox", "size": "17x17"}, 400),
        ({"prompt": "a fox", "n": 0}, 400),
        ({"prompt": "a fox", "num_inference_steps": "many"}, 400),
        ({"prompt": "a fox", "nothing": 1}, 400),
        ({"size": "32x32"}, 400),
        ({"prompt": "a fox", "model": "none"}, 404),
        ({"prompt": "a fox", "loras": [{"name": "none"}]}, 400),
        ({"prompt": "a fox", "background": True, "stream": True}, 400),
    ],
)
async def test_a_bad_request_is_refused_at_once_and_does_not_wake_it(
    server: Server, sleeper: Sleeper, body: dict[str, Any], status: int
) -> None:
    assert (await server.post(IMAGES, json=body)).status_code == status
    assert sleeper.calls == 0


# --- what wakes it ---


async def test_ten_requests_at_once_load_it_once_and_each_is_made(server: Server, sleeper: Sleeper) -> None:
    asking = [asyncio.create_task(server.post(IMAGES, json=FOX | {"seed": seed})) for seed in range(10)]
    await until(lambda: sleeper.loads == 1)
    models = (await get(server, "/health")).json()
    assert (models["status"], models["models"]) == ("ok", {"flux": "loading"})
    assert (await get(server, "/v1/models")).json()["data"][0]["state"] == "loading"
    sleeper.finish()
    answers = [await each for each in asking]
    assert [each.status_code for each in answers] == [200] * 10
    assert (sleeper.loads, len(server.requests)) == (1, 10)
    assert (await get(server, "/v1/models")).json()["data"][0]["state"] == "ready"
    assert isinstance(server.meter, RecordedMeter)
    assert server.meter.counted["triptych_model_wakes_total"] == {("flux",): 1.0}
    assert server.facts.kept.load_s is not None


async def test_the_first_caller_hears_that_it_is_not_measured_and_the_next_how_long_it_takes(
    server: Server, sleeper: Sleeper
) -> None:
    server.configure(sleep={"max_wait_s": 0.05})
    sleeper.sleep()
    first = await server.post(IMAGES, json=FOX)
    assert error_of(first)[:2] == (503, "model_loading")
    assert "not measured yet" in error_of(first)[2]
    assert int(first.headers["retry-after"]) > 0
    sleeper.finish()
    await until(lambda: server.facts.kept.load_s is not None)
    assert (await server.post(IMAGES, json=FOX)).status_code == 200
    sleeper.sleep()
    server.facts.kept = dataclasses.replace(server.facts.kept, load_s=140.0)
    server.close()  # an ingress replica that has measured nothing itself
    second = await server.post(IMAGES, json=FOX)
    assert error_of(second)[:2] == (503, "model_loading")
    assert "the last load took 140 s" in error_of(second)[2]
    assert second.headers["retry-after"] == "140"
    assert (await get(server, "/v1/models")).json()["data"][0]["load_s"] == 140.0
    assert sleeper.loads == 2


async def test_a_stream_says_that_the_model_loads_and_goes_on(server: Server, sleeper: Sleeper) -> None:
    server.configure(sleep={"max_wait_s": 0})
    sleeper.sleep()
    server.facts.kept = dataclasses.replace(server.facts.kept, load_s=39.4)
    answer = asyncio.create_task(server.post(IMAGES, json=FOX | {"stream": True}))
    await until(lambda: sleeper.loads == 1)
    sleeper.finish()
    told = [json.loads(line[6:]) for line in (await answer).text.splitlines() if line.startswith("data: ")]
    assert [each["type"] for each in told] == ["image_generation.waiting", "image_generation.completed"]
    assert (told[0]["for"], told[0]["about_s"]) == ("model", 40)


async def test_a_job_is_accepted_waits_and_says_for_what(server: Server, sleeper: Sleeper) -> None:
    server.configure(sleep={"max_wait_s": 0})
    sleeper.sleep()
    await server.open()
    server.service.start()
    async with server.client(timeout=60) as client:
        accepted = await client.post(IMAGES, json=FOX | {"background": True})
        assert accepted.status_code == 202
        await until(lambda: sleeper.loads == 1)
        sleeper.finish()
        job = await ended(client, accepted.json()["id"])
        events = (await client.get(f"/v1/jobs/{job['id']}/events")).text
    assert job["status"] == "completed"
    assert '"for": "model", "about_s": null' in events


async def test_a_call_with_an_idempotency_key_is_told_when_to_come_again_and_finds_its_job(
    server: Server, sleeper: Sleeper
) -> None:
    server.configure(sleep={"max_wait_s": 0.05})
    sleeper.sleep()
    await server.open()
    server.service.start()
    async with server.client(timeout=60, headers={"Idempotency-Key": "one"}) as client:
        assert error_of(await client.post(IMAGES, json=FOX))[:2] == (503, "model_loading")
        sleeper.finish()
        assert (await client.post(IMAGES, json=FOX)).status_code == 200
    assert (len(server.requests), sleeper.loads) == (1, 1)


async def test_a_request_waits_for_a_load_that_was_begun_elsewhere_and_does_not_measure_it(
    server: Server, sleeper: Sleeper
) -> None:
    assert server.states is not None
    server.states["Played"] = "waking"
    answer = asyncio.create_task(server.post(IMAGES, json=FOX))
    await until(lambda: sleeper.calls > 0)
    assert server.requests == []
    sleeper.finish()
    assert (await answer).status_code == 200
    assert (sleeper.loads, server.facts.kept.load_s) == (0, None)


async def test_a_model_of_which_nothing_is_known_is_woken_by_the_first_request(server: Server) -> None:
    sleeper = Sleeper(server)
    assert (await get(server, "/v1/models")).json()["data"][0] | {"created": 0} == {
        "id": "flux", "object": "model", "created": 0, "owned_by": "triptych", "parent": None, "alias_of": None,
        "kind": None, "state": "asleep", "load_s": None,
    }  # fmt: skip
    assert sleeper.calls == 0
    answer = await server.post(IMAGES, json=FOX)
    assert error_of(answer)[:2] == (503, "model_loading")
    sleeper.finish()
    await until(lambda: server.facts.kept.load_s is not None)
    assert (await server.post(IMAGES, json=FOX)).status_code == 200
    assert server.facts.kept.description == TEXT_TO_IMAGE


async def test_what_a_model_says_of_itself_is_asked_anew_when_it_was_loaded_again(
    server: Server, sleeper: Sleeper
) -> None:
    other = description("FluxPipeline", "strength")
    assert (await get(server, "/v1/models")).json()["data"][0]["state"] == "asleep"
    server.handle.describing = other
    answer = asyncio.create_task(server.post(IMAGES, json=FOX))
    await until(lambda: sleeper.loads == 1)
    sleeper.finish()
    assert (await answer).status_code == 200
    assert server.facts.kept.description == other
    assert await server.model.describe() == other


async def test_a_replica_that_was_just_going_is_not_taken_for_one_that_was_loaded(
    server: Server, sleeper: Sleeper
) -> None:
    sleeper.is_loaded.set()  # it answers, and is still to have no replica
    answer = asyncio.create_task(server.post(IMAGES, json=FOX))
    await until(lambda: sleeper.loads == 1)
    await asyncio.sleep(0.05)
    assert not answer.done()
    sleeper.finish()
    assert (await answer).status_code == 200


async def test_a_lora_of_the_configuration_is_not_read_while_the_model_sleeps(server: Server, tmp_path: Path) -> None:
    known = dataclasses.replace(TEXT_TO_IMAGE, takes_adapters=True)
    server.configure(known, adapters={"sketch": str(tmp_path / "a.safetensors")})
    server.facts.kept = Facts(known)
    sleeper = Sleeper(server)
    assert (await server.post(IMAGES, json=FOX | {"loras": ["sketch"], "size": "17x17"})).status_code == 400
    assert sleeper.calls == 0


async def test_requests_go_on_while_serves_controller_does_not_answer() -> None:
    def away(_: str) -> dict[str, State]:
        return {}

    sleep = ModelSleep({"Played": object()}, DeploymentStates("app", away))  # type: ignore[dict-item]
    await sleep.awake()
    assert await sleep.state() == "ready"


async def test_a_controller_that_has_become_slow_is_believed_what_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    is_slow = threading.Event()
    is_over = threading.Event()

    def ask(_: str) -> dict[str, State]:
        if is_slow.is_set():
            is_over.wait(30)
        return {"Played": "asleep"}

    with ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(deployment_states, "CONTROLLER_THREAD", thread)
        sleep = ModelSleep({"Played": object()}, DeploymentStates("app", ask))  # type: ignore[dict-item]
        assert await sleep.state() == "asleep"
        is_slow.set()
        monkeypatch.setattr(deployment_states, "TIMEOUT_S", 0.05)
        assert await sleep.state() == "asleep"
        assert await sleep.resting_deployments() == {"Played": "asleep"}
        is_over.set()


async def test_the_controller_is_asked_once_for_all_who_ask_and_not_while_the_model_is_in_use() -> None:
    asked = []

    def running(application: str) -> dict[str, State]:
        asked.append(application)
        return {"Played": "running"}

    sleep = ModelSleep({"Played": object()}, DeploymentStates("app", running))  # type: ignore[dict-item]
    await asyncio.gather(*(sleep.awake() for _ in range(5)))
    assert asked == ["app"]
    with sleep.in_use():
        await sleep.awake()
    assert asked == ["app"]


# --- what Serve says ---


@pytest.mark.parametrize(
    ("status", "replicas", "state"),
    [
        ("HEALTHY", {"RUNNING": 2}, "running"),
        ("UPSCALING", {"RUNNING": 1, "STARTING": 1}, "running"),
        ("HEALTHY", {}, "asleep"),
        ("DOWNSCALING", {"STOPPING": 1}, "asleep"),
        ("UPSCALING", {"STARTING": 1}, "waking"),
        ("UPSCALING", {}, "waking"),
        ("UPDATING", {"STARTING": 1}, "starting"),
        ("UPDATING", {}, "starting"),
        ("HEALTHY", {"STARTING": 1, "STOPPING": 1}, "starting"),
        ("UNHEALTHY", {"STARTING": 1}, "failed"),
        ("DEPLOY_FAILED", {}, "failed"),
    ],
)
def test_a_deployment_sleeps_where_it_is_to_have_no_replica(status: str, replicas: dict[str, int], state: str) -> None:
    assert state_of(status, replicas) == state


def test_what_is_kept_of_a_model_is_read_back_as_it_was() -> None:
    list_of_numbers = ValueType("union", (ValueType("none"), ValueType("list", (ValueType("float"),))))
    choice = ValueType("choice", choices=("a", None, 3))
    told = dataclasses.replace(
        TEXT_TO_IMAGE,
        tasks=("text_to_image",),
        argument_types={"sigmas": list_of_numbers, "way": choice},
        argument_notes={"sigmas": ArgumentNotes("the noise", [1, 2], 0.0, None)},
        start_s=12.5,
    )
    facts = Facts(told, (ArgumentDescription("sigmas", "list of number", [0.5], "always"),), 41.25)
    assert facts_from_json(facts_to_json(facts)) == facts
    assert facts_from_json(facts_to_json(Facts())) == Facts()


@pytest.mark.parametrize("data", [b"{}", b"[]", b"null", b"\xff", b'{"description": {"new": 1}, "arguments": null}'])
def test_what_another_version_has_kept_is_not_used(data: bytes) -> None:
    assert facts_from_json(data) == Facts()


def test_every_field_of_a_description_is_kept() -> None:
    """A new one that is no plain value must be read back too."""
    plain = {
        "str", "int", "float", "bool", "int | None", "MediaKind", "dict[str, Any]", "dict[str, int]",
        "Mapping[str, str]", "Mapping[str, StageDescription]",  # empty: what is kept is of one model
    }  # fmt: skip
    read_back = {"stages", "required", "features", "tasks", "argument_types", "argument_notes"}
    fields = {each.name: str(each.type) for each in dataclasses.fields(StageDescription)}
    assert {name for name, kind in fields.items() if kind not in plain} == read_back


def test_outside_of_a_cluster_no_controller_is_asked_which_would_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(deployment_states.serve, "status", lambda: pytest.fail("it was asked"))
    assert deployment_states.deployment_states("app") == {}
