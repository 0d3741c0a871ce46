"""A device that is full of other work: a job waits and goes on where it was, a call that waits is told when to come."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from deployments.errors import DeviceFullError
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    DenoisingProgress,
    GenerationRequest,
    Media,
    MediaFile,
    OutputFormat,
    Packed,
    PayloadFollows,
)
from serve_app.making import generate as generate_module
from serve_app.making.follower import NOBODY, Follower
from serve_app.making.generate import generate
from serve_app.making.layers.sharing import SharedGenerations
from serve_app.making.stages import Stages
from tests.support.in_process import make_at_once
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.played_stages import Reference, Stream

REQUEST = GenerationRequest("request", "model", {}, 0, OutputFormat("image", "png"))
FULL: Any = RayTaskError("call", "traceback", DeviceFullError("it has 1.0 GB free")).as_instanceof_cause()  # type: ignore[no-untyped-call]
CHECKPOINT = Checkpoint("request", 1, "fingerprint", "digest", Packed(None))
MEDIA = Media((MediaFile(b"picture"),))
INPUTS: tuple[Any, ...] = (PayloadFollows("decode_inputs", 2), DecodeInputs("result", Packed(None)))


@pytest.fixture(autouse=True)
def rests(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """None is made; the longest that each could have been."""
    asked: list[float] = []

    async def note(longest_s: float) -> None:
        asked.append(longest_s)
        await asyncio.sleep(0)

    monkeypatch.setattr(generate_module, "_rest", note)
    return asked


class Patient(Follower):
    wants_progress = True

    def __init__(self, patience_s: float = 100.0) -> None:
        self.patience_s = patience_s
        self.waits: list[str] = []

    def on_wait(self, what_for: str, about_s: float | None = None) -> None:
        self.waits.append(what_for)


class Handle:
    """Of each stage; it is full as often as is said, the denoiser after its first step."""

    deployment_name = "Handle"

    def __init__(self, **full: int) -> None:
        self.full = full
        self.calls: list[tuple[str, Any]] = []  # stage, what it was given last

    def options(self, **_: Any) -> Handle:
        return self

    def __getattr__(self, stage: str) -> Any:
        return type("Method", (), {"remote": lambda _, *given: self._call(stage, given[-1])})()

    def _call(self, stage: str, given: Any) -> Any:
        self.calls.append((stage, given))
        is_full = self.full.get(stage, 0) > 0
        self.full[stage] = self.full.get(stage, 0) - 1
        if stage == "denoise":
            return Stream(self._items(is_full))
        return Reference(FULL if is_full else MEDIA if stage == "decode" else "conditioning")

    async def _items(self, is_full: bool) -> Any:
        for item in (
            PayloadFollows("checkpoint", 1),
            CHECKPOINT,
            DenoisingProgress(2, 3),
            *((FULL,) if is_full else INPUTS),
        ):
            yield item


def made(handle: Any, follower: Follower) -> Media:
    return asyncio.run(generate(Stages(handle, handle, handle), REQUEST, follower))


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_who_waits_for_a_full_device_goes_on_where_he_was(stage: str, rests: list[float]) -> None:
    handle, follower = Handle(**{stage: 3}), Patient()
    assert made(handle, follower).files == MEDIA.files
    names = [name for name, _ in handle.calls]
    assert {name: names.count(name) for name in set(names)} == {"encode": 1, "denoise": 1, "decode": 1} | {stage: 4}
    assert (follower.waits, rests) == (["device"] * 3, [1, 2, 4])
    if stage == "denoise":
        assert [given for name, given in handle.calls if name == "denoise"] == [None, *[CHECKPOINT] * 3]


def test_who_does_not_wait_is_told_at_once(rests: list[float]) -> None:
    with pytest.raises(DeviceFullError):
        made(Handle(denoise=1), NOBODY)
    assert rests == []


def test_patience_has_an_end_and_begins_anew_where_it_got_further(rests: list[float]) -> None:
    with pytest.raises(DeviceFullError):
        made(Handle(decode=99), Patient(100))
    assert rests == [1, 2, 4, 8, 16, 30, 30]
    rests.clear()
    assert made(Handle(encode=6, decode=6), Patient(70)).files == MEDIA.files
    assert rests == [1, 2, 4, 8, 16, 30] * 2


async def test_a_generation_that_a_patient_one_shares_waits() -> None:
    handle: Any = Handle(encode=1)

    async def make(request: GenerationRequest, follower: Follower) -> Media:
        return await generate(Stages(handle, handle, handle), request, follower)

    shared, job = SharedGenerations(make), Patient()
    both = [shared.make(REQUEST, follower) for follower in (job, Follower())]
    assert all(media.files == MEDIA.files for media in await asyncio.gather(*both))
    assert job.waits == ["device"]


async def test_over_http_a_job_waits_and_tells_so_and_a_call_gets_503_with_retry_after(tmp_path: Path) -> None:
    full = [1, 1, 1, 0]

    async def make(request: GenerationRequest) -> Media:
        if full.pop(0):
            raise FULL
        return await make_at_once(request)

    async with server_with_jobs(tmp_path) as (server, client):
        server.make = make
        body = {"prompt": "a cat", "size": "32x32"}
        answer = await client.post("/v1/images/generations", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_full")
        assert int(answer.headers["Retry-After"]) > 0
        job = (await client.post("/v1/images/generations", json={**body, "background": True})).json()
        assert (await ended(client, job["id"]))["status"] == "completed"
        events = server.service.jobs.store.story(job["id"], 0).events
        assert [event.data for event in events if event.kind == "waiting"] == [{"request": 0, "for": "device"}]
