"""The load generator against stand-in servers: what it counts as made, as failed and as in time."""

import asyncio
import json
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import serving
from benchmarks.openai_requests import Answer, MixEntry, OpenAIServer, read_mix

PICTURE = MixEntry("picture", "image", 1.0, {"prompt": "number {number}"}, slo_s=100.0)
VIDEO = MixEntry("video", "video", 1.0, {"prompt": "number {number}"}, slo_s=100.0)
MADE = {"data": [{"b64_json": "AAAA"}], "timings": [{"denoise": 0.5}]}
Handler = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


def server_of(handler: Handler, timeout_s: float = 60) -> OpenAIServer:
    return OpenAIServer("http://stand-in", "a-model", timeout_s, None, httpx.MockTransport(handler))


async def answer_to(handler: Handler, entry: MixEntry = PICTURE, as_job: bool = False) -> Answer:
    async with server_of(handler) as server:
        return await server.send(entry, 7, as_job)


def always(answer: httpx.Response) -> Handler:
    async def handler(_: httpx.Request) -> httpx.Response:
        return answer

    return handler


async def test_a_picture_is_made_and_its_timings_are_kept() -> None:
    bodies = []

    async def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, json=MADE)

    answer = await answer_to(handler)
    assert answer.failure is None
    assert answer.timings == [{"denoise": 0.5}]
    assert bodies == [{"prompt": "number 7", "model": "a-model"}]


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        (httpx.Response(429, json={"error": {"code": "overloaded"}}), "http_429 overloaded"),
        (httpx.Response(500, text="Internal Server Error"), "http_500"),
        (httpx.Response(200, json={"data": []}), "no picture in the answer"),
        (httpx.Response(200, json={"data": [{"b64_json": None}]}), "no picture in the answer"),
    ],
)
async def test_failures_are_told_apart(response: httpx.Response, failure: str) -> None:
    assert (await answer_to(always(response))).failure == failure


async def test_a_server_that_is_not_there_and_one_that_never_answers_are_failures() -> None:
    async def refuses(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async def hangs(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(3600)
        raise AssertionError

    assert (await answer_to(refuses)).failure == "connection: ConnectError"
    async with server_of(hangs, timeout_s=0.05) as server:
        assert (await server.send(PICTURE, 0, False)).failure == "timeout"


class JobServer:
    """A server with jobs and events, of which the test chooses the last."""

    def __init__(self, last: str = "completed") -> None:
        self.last = last

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(202 if b'"background"' in request.content else 200, json={"id": "job-1"})
        if request.url.path.endswith("/events"):
            return httpx.Response(200, content=self.events())
        return httpx.Response(200, json={"id": "job-1", "result": MADE, "error": None})

    async def events(self) -> AsyncIterator[bytes]:
        for kind in ("queued", "step", "step", self.last):
            yield f"event: {kind}\ndata: {{}}\n\n".encode()


@pytest.mark.parametrize("entry", [PICTURE, VIDEO])
async def test_a_job_is_followed_by_its_events_to_its_end(entry: MixEntry) -> None:
    answer = await answer_to(JobServer(), entry, as_job=True)
    assert answer.failure is None
    assert answer.progress_s is not None
    assert answer.timings == [{"denoise": 0.5}]


async def test_a_job_that_fails_is_a_failure() -> None:
    assert (await answer_to(JobServer("failed"), as_job=True)).failure == "job ended with failed"


async def test_a_server_without_events_is_said_to_have_none() -> None:
    async with server_of(always(httpx.Response(200, json=MADE))) as server:
        assert await server.why_no_events(PICTURE) == "a picture as a job ended as no job"
    async with server_of(JobServer()) as server:
        assert await server.why_no_events(PICTURE) is None


async def test_a_video_of_a_server_without_events_is_polled_to_its_end() -> None:
    states = iter(["queued", "in_progress", "completed"])

    async def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, json={"id": "video-1", "status": "queued"})
        if request.url.path.startswith("/v1/jobs"):
            return httpx.Response(404)
        return httpx.Response(200, json={"id": "video-1", "status": next(states)})

    assert (await answer_to(handler, VIDEO)).failure is None
    assert next(states, None) is None


async def test_a_slow_server_is_charged_for_the_queue_that_it_lets_grow() -> None:
    one_at_a_time = asyncio.Lock()

    async def handler(_: httpx.Request) -> httpx.Response:
        async with one_at_a_time:
            await asyncio.sleep(0.04)
        return httpx.Response(200, json=MADE)

    async with server_of(handler) as server:
        load = await serving.run_load(server, [PICTURE], rate=100, duration_s=0.3, seed=0, jobs_every=0)
    number, last = len(load.timed), load.timed[-1]
    assert last.latency_s >= 0.04 * number - last.intended_s - 0.01 * number
    assert serving.describe(load)["all"]["made"] == number


async def test_failed_requests_count_against_the_slo_and_have_no_latency() -> None:
    numbers = iter(range(1000))

    async def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(503) if next(numbers) % 2 else httpx.Response(200, json=MADE)

    async with server_of(handler) as server:
        load = await serving.run_load(server, [PICTURE], rate=200, duration_s=0.2, seed=0, jobs_every=0)
    found = serving.describe(load)["all"]
    half = len(load.timed) // 2
    assert found["failures"] == {"http_503": half}
    assert found["made"] == len(load.timed) - half
    assert found["slo_attainment"] == pytest.approx(found["made"] / len(load.timed))


async def test_the_whole_report_is_made_for_a_server_with_jobs_and_for_one_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def with_jobs(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and b'"background"' not in request.content:
            return httpx.Response(200, json=MADE)
        return await JobServer()(request)

    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps([{"name": "small", "media": "image", "weight": 1, "body": {"prompt": "a fox"}}]))
    options = Namespace(
        base_url="http://stand-in/v1/", model="m", rate=[50.0], duration=0.3, mix=mix, slo_scale=1e6, jobs_every=2,
        timeout=60.0, seed=0,
    )  # fmt: skip
    for handler, has_jobs in ((with_jobs, True), (always(httpx.Response(200, json={"data": [{"url": "u"}]})), False)):
        monkeypatch.setattr(serving, "OpenAIServer", lambda *_, handler=handler: server_of(handler))
        result = await serving.measure(options)
        text = "\n".join(serving.as_markdown(result))
        assert ("followed" in text) is has_jobs
        assert ("was not measured: a picture as a job ended as no job" in text) is not has_jobs
        assert ("denoise" in text) is has_jobs
        assert "| 50/s, all |" in text
        assert result["loads"][0]["all"]["slo_attainment"] == 1.0


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"name": "x", "media": "audio", "weight": 1, "body": {}}, "media must be image or video, got 'audio'"),
        ({"name": "x", "media": "image", "weight": 0, "body": {}}, "weight must be above 0"),
        ({"name": "x", "media": "image", "weight": 1, "body": {}, "slo": 1}, "entry 0: .*slo"),
        ({"name": "x"}, "entry 0: .*missing"),
    ],
)
def test_a_mistake_in_a_mix_is_named(entry: dict[str, Any], problem: str, tmp_path: Path) -> None:
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=problem):
        read_mix(file)


@pytest.mark.parametrize("file", sorted(serving.MIX.parent.glob("*.json")), ids=lambda file: file.stem)
def test_the_mixes_that_come_with_it_are_read(file: Path) -> None:
    assert read_mix(file)
