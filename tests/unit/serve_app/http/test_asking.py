"""How callers ask: keys that find their results again, waiting for a while, limits of time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from deployments.errors import InvalidRequestError, StorageError
from deployments.messages import DenoisingBegun, Envelope, GenerationRequest, Media
from serve_app.deadlines import NO_LIMITS, TimeLimits
from serve_app.errors import JobStoreAwayError
from serve_app.http.asked import how_asked
from serve_app.jobs import runner, service
from tests.support.in_process import Server, description, make_at_once, until
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import make_video, video_file

IMAGES = "/v1/images/generations"
KEY = {"Idempotency-Key": "k"}
VIDEO = description("WanPipeline", "image", "num_frames", "fps", media_kind="video")
BODY: dict[str, Any] = {"prompt": "x"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    monkeypatch.setattr(service, "OVERDUE_PAUSE_S", 0.02)


class HeldServer:
    """A server whose stages make nothing before they are let go."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.let_go = asyncio.Event()
        self.cancelled = 0
        server.make = self._make

    async def _make(self, request: GenerationRequest) -> Media:
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await (make_video if request.output.kind == "video" else make_at_once)(request)

    def begins(self) -> None:
        """From now on denoisers take up what they get."""
        items = self.server.handle._items

        async def begun(envelope: Envelope) -> AsyncIterator[Any]:
            yield DenoisingBegun()
            async for item in items(envelope):
                yield item

        self.server.handle._items = begun  # type: ignore[method-assign]


@asynccontextmanager
async def held(folder: Path, **settings: Any) -> AsyncIterator[tuple[HeldServer, httpx.AsyncClient]]:
    async with server_with_jobs(folder, **settings) as (server, client):
        yield HeldServer(server), client


async def hung_up(client: httpx.AsyncClient, server: HeldServer, **request: Any) -> None:
    """A call whose connection is lost once its request has come as far as the stages."""
    before = len(server.server.requests)
    call = asyncio.create_task(client.post(**request))
    await until(lambda: len(server.server.requests) > before)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


# --- keys ---


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
async def test_the_same_call_after_a_lost_connection_is_answered_as_the_first_would_have_been(
    tmp_path: Path, response_format: str
) -> None:
    body = BODY | {"seed": 3, "n": 2, "response_format": response_format}
    async with held(tmp_path) as (server, client):
        await hung_up(client, server, url=IMAGES, json=body, headers=KEY)
        again = asyncio.create_task(client.post(IMAGES, json=body, headers=KEY))
        await asyncio.sleep(0.05)
        assert not again.done()  # it waits for what the first call began
        server.let_go.set()
        answer = await again
        plain = await client.post(IMAGES, json=body)
        later = await client.post(IMAGES, json=body, headers=KEY)
        assert server.cancelled == 0
        assert len(server.server.requests) == 4  # two for the key, two without
    assert later.text == answer.text
    assert answer.json().keys() == plain.json().keys()
    for ours, theirs in zip(answer.json()["data"], plain.json()["data"], strict=True):
        assert (ours["b64_json"], ours["seed"]) == (theirs["b64_json"], theirs["seed"])
        assert (ours["url"] is None) == (theirs["url"] is None)


async def test_a_repeated_call_does_not_need_what_the_first_has_read(tmp_path: Path) -> None:
    describing = description("WanVideoToVideoPipeline", "video", media_kind="video", tasks=("video_to_video",))
    async with server_with_jobs(tmp_path, describing=describing) as (server, client):
        server.make = make_video
        sent = {"data": {"prompt": "x"}, "files": {"video": video_file()}}
        source = (await client.post("/v1/videos/edits", **sent)).json()["id"]
        await ended(client, source)
        edit = {"url": "/v1/videos/edits", "json": {"prompt": "y", "video": {"id": source}}, "headers": KEY}
        first = await client.post(**edit)
        await ended(client, first.json()["id"])
        await client.delete(f"/v1/videos/{source}")
        again = await client.post(**edit)
        without = await client.post(edit["url"], json=edit["json"])
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    assert without.status_code == 404


async def test_a_key_is_for_one_body_and_one_that_was_refused_is_still_free(tmp_path: Path) -> None:
    remote = BODY | {"image": "https://pictures.example/a.png"}
    async with server_with_jobs(tmp_path, describing=description("FluxImg2ImgPipeline", "image")) as (_, client):
        refused = await client.post(IMAGES, json=remote, headers=KEY)
        made = await client.post(IMAGES, json=BODY, headers=KEY)
        other = await client.post(IMAGES, json=remote, headers=KEY)
    assert refused.json()["error"]["param"] == "image"  # nothing is fetched here
    assert made.status_code == 200
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert other.headers["x-should-retry"] == "false"  # OpenAI's client would repeat it


async def test_a_lost_connection_without_a_key_ends_the_generation_and_with_one_it_goes_on(tmp_path: Path) -> None:
    async with held(tmp_path) as (server, client):
        await hung_up(client, server, url=IMAGES, json=BODY | {"seed": 1})
        await until(lambda: server.cancelled == 1)
        await hung_up(client, server, url=IMAGES, json=BODY | {"seed": 2}, headers=KEY)
        await hung_up(client, server, url=IMAGES, json=BODY | {"seed": 3}, headers={"Prefer": "wait=30"})
        server.let_go.set()
        jobs = (await client.get("/v1/jobs")).json()["data"]
        assert [(await ended(client, job["id"]))["status"] for job in jobs] == ["completed", "completed"]
        assert server.cancelled == 1


async def test_a_stream_with_a_key_goes_on_and_is_told_again_from_its_first_event(tmp_path: Path) -> None:
    body = BODY | {"stream": True, "partial_images": 1, "n": 2, "seed": 5}
    async with held(tmp_path) as (server, client):
        await hung_up(client, server, url=IMAGES, json=body, headers=KEY)
        server.let_go.set()
        again = await client.post(IMAGES, json=body, headers=KEY)
        plain = await client.post(IMAGES, json=body)
    ours, theirs = events_of(again), events_of(plain)
    assert [kind for kind, _ in ours].count("image_generation.partial_image") == 2
    completed = {kind: [data for kind_, data in told if kind_ == kind] for told in (ours,) for kind, _ in told}
    made = completed["image_generation.completed"]
    truth = [data for kind, data in theirs if kind == "image_generation.completed"]
    assert sorted(data["seed"] for data in made) == [5, 6]
    assert {data["b64_json"] for data in made} == {data["b64_json"] for data in truth}
    assert made[0].keys() == truth[0].keys()


async def test_a_stream_with_a_key_ends_with_the_error_of_its_job(tmp_path: Path) -> None:
    async def fail(request: GenerationRequest) -> Media:
        raise InvalidRequestError("no such thing", "prompt")

    async with server_with_jobs(tmp_path) as (server, client):
        server.make = fail
        told = events_of(await client.post(IMAGES, json=BODY | {"stream": True}, headers=KEY))
    assert [kind for kind, _ in told] == ["error"]
    assert (told[0][1]["error"]["param"], told[0][1]["error"]["message"]) == ("prompt", "no such thing")


@pytest.mark.parametrize(
    ("place", "method", "failure", "code"),
    [
        ("jobs", "get", JobStoreAwayError("away"), "job_store_unavailable"),
        ("storage", "load", StorageError("away"), "storage_failed"),
    ],
)
async def test_a_stream_with_a_key_ends_with_an_error_where_its_pictures_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, method: str, failure: Exception, code: str
) -> None:
    async def fail(*_: Any) -> Any:
        raise failure

    async with server_with_jobs(tmp_path) as (server, client):
        monkeypatch.setattr(getattr(server.service, place), method, fail)
        answer = await client.post(IMAGES, json=BODY | {"stream": True}, headers=KEY)
    [(kind, data)] = events_of(answer)
    assert (kind, data["error"]["code"]) == ("error", code)


async def test_the_end_of_a_job_is_told_also_where_its_files_cannot_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        job = (await client.post(IMAGES, json=BODY, headers={"Prefer": "respond-async"})).json()
        await ended(client, job["id"])
        jobs, looks = server.service.jobs, []
        get = jobs.get

        async def fail_later(*args: Any) -> Any:
            looks.append(args)
            if len(looks) > 1:
                raise JobStoreAwayError("away")
            return await get(*args)

        monkeypatch.setattr(jobs, "get", fail_later)
        answer = await client.get(f"/v1/jobs/{job['id']}/events")
    last = answer.text.strip().split("\n\n")[-1]
    assert "event: completed" in last
    assert "urls" not in last
    assert len(looks) == 2


async def test_a_caller_who_waits_for_a_job_goes_before_those_who_do_not(tmp_path: Path) -> None:
    async with held(tmp_path, jobs={"max_running": 1}) as (server, client):
        for seed in range(3):
            await client.post(IMAGES, json=BODY | {"seed": seed}, headers={"Prefer": "respond-async"})
        await until(lambda: len(server.server.requests) == 1)
        call = asyncio.create_task(client.post(IMAGES, json=BODY | {"seed": 9}, headers=KEY))
        await until(lambda: len(server.server.requests) == 2)
        assert server.server.requests[-1].seed == 9
        server.let_go.set()
        assert (await call).status_code == 200


# --- Prefer: wait ---


async def test_a_caller_who_waits_long_enough_gets_the_result_and_others_the_job(tmp_path: Path) -> None:
    async with held(tmp_path) as (server, client):
        job = await client.post(IMAGES, json=BODY, headers={"Prefer": "wait=0"} | KEY)
        assert (job.status_code, job.json()["object"]) == (202, "job")
        assert (job.headers["location"], job.headers["retry-after"]) == (f"/v1/jobs/{job.json()['id']}", "1")
        assert job.headers["preference-applied"] == "wait=0"
        waiting = asyncio.create_task(client.get(job.headers["location"], headers={"Prefer": "wait=30"}))
        server.let_go.set()
        assert (await waiting).json()["status"] == "completed"
        result = await client.post(IMAGES, json=BODY, headers={"Prefer": "respond-async, wait=30"} | KEY)
    assert (result.status_code, len(result.json()["data"])) == (200, 1)
    assert result.headers["preference-applied"] == "respond-async, wait=30"


async def test_a_video_can_be_waited_for_where_it_is_asked_for_and_where_it_is_read(tmp_path: Path) -> None:
    async with held(tmp_path, describing=VIDEO) as (server, client):
        queued = await client.post("/v1/videos", json=BODY, headers={"Prefer": "wait=0"})
        assert queued.json()["status"] in ("queued", "in_progress")
        server.let_go.set()
        read = await client.get(f"/v1/videos/{queued.json()['id']}", headers={"Prefer": "wait=30"})
        made = await client.post("/v1/videos", json=BODY, headers={"Prefer": "wait=30"})
        result = await client.post("/v1/videos/generations", json=BODY, headers={"Prefer": "wait=30"})
    assert [each.json()["status"] for each in (read, made)] == ["completed", "completed"]
    assert made.headers["preference-applied"] == "wait=30"
    assert (result.status_code, result.json()["num_frames"] > 0) == (200, True)


# --- limits of time ---

LIMITS = {"Cancel-After": "cancel_after", "X-Request-Start-Timeout": "start_timeout"}


@pytest.mark.parametrize("header", LIMITS)
@pytest.mark.parametrize("way", ["at once", "with a key", "as a stream", "as a stream with a key", "as a job"])
async def test_what_takes_longer_than_its_caller_allows_is_cancelled_and_told(
    tmp_path: Path, way: str, header: str
) -> None:
    headers = {header: "0.1"} | (KEY if "key" in way else {}) | ({"Prefer": "wait=30"} if way == "as a job" else {})
    async with held(tmp_path) as (server, client):
        answer = await client.post(IMAGES, json=BODY | {"stream": "stream" in way}, headers=headers)
        await until(lambda: server.cancelled == len(server.server.requests))
        assert server.server.model.admission.num_pending == 0
        for job in (await client.get("/v1/jobs")).json()["data"]:
            assert (job["status"], job["error"]["code"]) == ("cancelled", LIMITS[header])
    error = events_of(answer)[-1][1]["error"] if "stream" in way else answer.json()["error"]
    assert (answer.status_code, error["code"]) == (200 if "stream" in way else 504, LIMITS[header])
    assert f"0.1 s after it was accepted ({header})" in error["message"]
    if "stream" not in way:
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("headers", [{}, KEY], ids=["at once", "with a key"])
async def test_what_has_begun_in_time_may_take_longer_than_its_start(tmp_path: Path, headers: dict[str, str]) -> None:
    async with held(tmp_path) as (server, client):
        server.begins()
        call = asyncio.create_task(client.post(IMAGES, json=BODY, headers={"X-Request-Start-Timeout": "1"} | headers))
        await asyncio.sleep(1.2)
        server.let_go.set()
        assert (await call).status_code == 200


async def test_one_of_two_callers_for_the_same_work_may_leave_at_its_limit(tmp_path: Path) -> None:
    body = BODY | {"seed": 1}
    async with held(tmp_path) as (server, client):
        patient = asyncio.create_task(client.post(IMAGES, json=body))
        await until(lambda: len(server.server.requests) == 1)
        hasty = await client.post(IMAGES, json=body, headers={"Cancel-After": "0.05"})
        server.let_go.set()
        assert (hasty.status_code, (await patient).status_code) == (504, 200)
        assert (len(server.server.requests), server.cancelled) == (1, 0)


async def test_a_job_that_never_began_is_made_by_no_later_runner(tmp_path: Path) -> None:
    async with held(tmp_path, jobs={"max_running": 1}) as (server, client):
        async_ = {"Prefer": "respond-async"}
        first = (await client.post(IMAGES, json=BODY | {"seed": 1}, headers=async_)).json()
        await until(lambda: len(server.server.requests) == 1)
        late = async_ | {"X-Request-Start-Timeout": "0.05"}
        second = (await client.post(IMAGES, json=BODY | {"seed": 2}, headers=late)).json()
        refused = await ended(client, second["id"])
        server.let_go.set()
        assert (await ended(client, first["id"]))["status"] == "completed"
        assert (refused["status"], refused["error"]["code"]) == ("cancelled", "start_timeout")
        assert len(server.server.requests) == 1


# --- what the headers can say ---


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, NO_LIMITS),
        ({"cancel-after": "30"}, TimeLimits(total_s=30)),
        ({"cancel-after": "1h30m5s"}, TimeLimits(total_s=5405)),
        ({"cancel-after": "5m"}, TimeLimits(total_s=300)),
        ({"x-request-start-timeout": "2.5"}, TimeLimits(start_s=2.5)),
        ({"x-request-start-timeout": "90s", "cancel-after": "2h"}, TimeLimits(90, 7200)),
    ],
)
def test_limits_are_seconds_or_hours_minutes_and_seconds(given: dict[str, str], limits: TimeLimits) -> None:
    assert how_asked(Headers(given)).limits == limits


BAD: list[tuple[str, str]] = [
    *(
        ("Cancel-After", value)
        for value in ("0", "-1", "", "soon", "1e3", "nan", "5 m", "1m2h", "9h9h", "99999999", "٣")
    ),
    *(("X-Request-Start-Timeout", value) for value in ("0", "0s", "-1", "inf", "1d")),
    *(("Prefer", value) for value in ("wait", "wait=", "wait=-1", "wait=1.5", "wait=soon", "wait=3601", "wait=٣")),
]


@pytest.mark.parametrize(("name", "value"), BAD)
async def test_a_value_that_a_header_cannot_have_is_refused_by_its_name(tmp_path: Path, name: str, value: str) -> None:
    given = Headers(raw=[(name.lower().encode(), value.encode("utf-8"))])
    with pytest.raises(InvalidRequestError) as refused:
        how_asked(given)
    assert refused.value.param == name
    assert refused.value.message.startswith(name)


def test_preferences_are_read_as_their_standard_says() -> None:
    several = Headers(raw=[(b"prefer", b"handling=lenient"), (b"prefer", b'Wait="7"; x=1, wait=9, respond-async')])
    asked = how_asked(several)
    assert (asked.wait_s, asked.respond_async, asked.preference_applied) == (7, True, "respond-async, wait=7")


async def test_the_headers_are_in_the_document_of_every_route_that_makes_something(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (_, client):
        paths = (await client.get("/openapi.json")).json()["paths"]
    asking = {"Idempotency-Key", "Prefer", "Cancel-After", "X-Request-Start-Timeout"}
    for path in ("images/generations", "images/edits", "videos", "videos/generations", "videos/edits",
                 "videos/extensions", "videos/{video_id}/remix"):  # fmt: skip
        assert asking <= {each["name"] for each in paths[f"/v1/{path}"]["post"]["parameters"]}
    for path in ("jobs/{job_id}", "videos/{video_id}"):
        assert {each["name"] for each in paths[f"/v1/{path}"]["get"]["parameters"]} >= {"Prefer"}
    assert "202" in paths["/v1/images/generations"]["post"]["responses"]


def events_of(answer: httpx.Response) -> list[tuple[str, Any]]:
    blocks = [block.splitlines() for block in answer.text.split("\n\n") if block.startswith("event:")]
    return [(head.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for head, data in blocks]
