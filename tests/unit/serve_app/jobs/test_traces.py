"""A job goes on in the trace of the request that asked for it, whoever runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import GenerationFailedError
from deployments.messages import GenerationRequest, Media, OutputFormat
from serve_app.jobs import runner
from serve_app.jobs.codec import requests_from_json, requests_to_json, trace_from_json
from serve_app.jobs.webhooks import sender
from tests.support.in_process import serving, until
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.traced import Traces, attributes_of, id_of, parent_of, trace_of, traces
from tests.support.web_server import Receiver, web_server

__all__ = ["traces"]

ROUTE = "/v1/images/generations"
BODY = {"prompt": "a fox", "background": True, "seed": 5}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
CARRIER = dict(HEADERS)
OUTPUT = OutputFormat("image", "png")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    monkeypatch.setattr(sender, "PAUSE_S", 0.02)


async def test_a_job_is_a_part_of_the_request_that_asked_for_it(traces: Traces, tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path / "outputs") as (_, client):
        answer = await client.post(ROUTE, json=BODY, headers=HEADERS)
        job_id = answer.json()["id"]
        assert (await ended(client, job_id))["status"] == "completed"
        await until(lambda: bool(traces.named("job")))
    request, job, queue = traces.one(f"POST {ROUTE}"), traces.one("job"), traces.one("queue")
    assert attributes_of(request)["job_id"] == job_id
    assert trace_of(job) == TRACE
    assert {parent_of(job), parent_of(queue)} == {id_of(request)}
    told = attributes_of(job)
    assert (told["job_id"], told["attempt"], told["taken_over"], told["n"]) == (job_id, 1, False, 1)
    assert parent_of(traces.one("make")) == parent_of(traces.one("store")) == id_of(job)
    assert (queue.start_time or 0) < (job.start_time or 0)


async def test_who_takes_a_job_over_goes_on_in_its_trace(traces: Traces, tmp_path: Path) -> None:
    with serving(tmp_path / "outputs") as server:
        server.configure(jobs={"lease_s": 0.1})
        await server.open()
        jobs = server.service.jobs
        async with server.client(timeout=60) as client:
            job_id = (await client.post(ROUTE, json=BODY, headers=HEADERS)).json()["id"]
            assert jobs.store.claim("the ingress that dies", 0.1) is not None
            server.service.start()
            assert (await ended(client, job_id))["status"] == "completed"
            await until(lambda: bool(traces.named("job")))
    job = traces.one("job")
    assert trace_of(job) == TRACE
    assert (attributes_of(job)["attempt"], attributes_of(job)["taken_over"]) == (2, True)
    assert traces.named("queue") == [], "it waits no second time"


async def test_a_failed_job_says_its_code(traces: Traces, tmp_path: Path) -> None:
    async def fail(request: GenerationRequest) -> Media:
        raise GenerationFailedError("what the caller wrote")

    async with server_with_jobs(tmp_path / "outputs") as (server, client):
        server.make = fail
        job_id = (await client.post(ROUTE, json=BODY)).json()["id"]
        job = await ended(client, job_id)
        await until(lambda: bool(traces.named("job")))
    assert attributes_of(traces.one("job"))["error.type"] == job["error"]["code"] == "generation_failed"
    assert "wrote" not in traces.text


async def test_each_delivery_of_a_webhook_is_a_span_that_its_target_may_go_on_from(
    traces: Traces, tmp_path: Path
) -> None:
    receiver = Receiver(500, 200)
    (tmp_path / "secret").write_text("a secret of webhooks")
    settings = {"jobs": {"webhook_secret": {"file": str(tmp_path / "secret")}}, "private_targets": True}
    async with web_server(receiver.answer) as url, server_with_jobs(tmp_path / "outputs", **settings) as (_, client):
        body = BODY | {"webhook_url": f"{url}/hook?token=secret-token"}
        assert (await client.post(ROUTE, json=body, headers=HEADERS)).status_code == 202
        await until(lambda: len(traces.named("webhook")) == 2)
    first, second = traces.named("webhook")
    assert [attributes_of(span)["outcome"] for span in (first, second)] == ["failed", "taken"]
    assert [attributes_of(span)["attempt"] for span in (first, second)] == [1, 2]
    assert {trace_of(span) for span in (first, second)} == {TRACE}
    sent = [{name.lower(): value for name, value in headers.items()} for headers, _ in receiver.received]
    assert [each["traceparent"] for each in sent] == [f"00-{TRACE}-{id_of(span):016x}-01" for span in (first, second)]
    assert "secret-token" not in traces.text


def test_a_row_keeps_the_trace_and_its_work_is_the_same() -> None:
    request = GenerationRequest("r", "flux", {"prompt": "a fox"}, 1, OUTPUT)
    plain, _ = requests_to_json([request])
    rows, _ = requests_to_json([request], 0, CARRIER)
    assert trace_from_json(rows) == CARRIER
    assert requests_from_json(rows, []) == [request]
    assert "trace" not in plain[0], "a row of a request that is not traced is as before"
    assert trace_from_json(plain) == {}


@pytest.mark.parametrize("trace", [None, 7, [], {"traceparent": 7}, "text"])
def test_what_is_no_trace_in_a_row_is_none(trace: object) -> None:
    assert trace_from_json([{"trace": trace}]) == {}
    assert trace_from_json(trace) == {}
