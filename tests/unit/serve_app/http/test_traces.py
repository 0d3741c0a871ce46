"""The trace of a request through the real routes and layers, with played stages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.errors import GenerationFailedError, StorageError
from deployments.messages import GenerationRequest, Media
from tests.support.in_process import Server, make_at_once, serving, until
from tests.support.traced import Traces, attributes_of, events_of, id_of, parent_of, trace_of, traces

__all__ = ["traces"]

ROUTE = "/v1/images/generations"
SECRET = "xylophones quietly zigzag"
BODY = {"prompt": SECRET, "response_format": "url", "size": "64x32", "num_inference_steps": 3, "seed": 5}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "outputs") as server:
        yield server


async def test_a_request_is_one_trace_from_the_route_to_the_stored_file(traces: Traces, server: Server) -> None:
    answer = await server.post(ROUTE, json=BODY | {"n": 2}, headers={"x-request-id": "of-serve"})
    assert answer.status_code == 200, answer.text
    lines = traces.tree().splitlines()
    assert lines[:2] == [f"POST {ROUTE}", "  read"]
    assert sorted(lines[2:]) == sorted(
        ["  make", "    encode", "    denoise", "    decode"] * 2 + ["  store", "  store"]
    )
    assert len({trace_of(span) for span in traces.spans}) == 1
    request = traces.one(f"POST {ROUTE}")
    asked = attributes_of(request)
    assert asked["http_request_id"] == "of-serve"
    assert (asked["model"], asked["n"]) == ("flux", 2)
    assert asked["http.request.method"] == "POST"
    assert asked["http.response.status_code"] == 200
    assert asked["http.route"] == asked["url.path"] == ROUTE
    assert (asked["server.address"], asked["server.port"]) == ("test", 80)
    assert events_of(request) == ["admitted"]
    makes = traces.named("make")
    assert [attributes_of(make)["request_id"] for make in makes] == [f"{asked['request_id']}-{i}" for i in range(2)]
    made = attributes_of(makes[0])
    assert (made["width"], made["height"], made["steps"], made["seed"]) == (64, 32, 3, 5)
    [*carried] = {envelope.trace["traceparent"].split("-")[1] for envelope in server.handle.envelopes}
    assert carried == [trace_of(request)], "the stages are told the trace"


async def test_a_stage_is_told_the_call_that_it_is_a_part_of(traces: Traces, server: Server) -> None:
    await server.post(ROUTE, json=BODY)
    [envelope] = server.handle.envelopes
    assert envelope.trace["traceparent"].split("-")[2] == f"{id_of(traces.one('encode')):016x}"


async def test_the_callers_trace_goes_on(traces: Traces, server: Server) -> None:
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "baggage": f"user={SECRET}"}
    await server.post(ROUTE, json=BODY, headers=headers)
    assert {trace_of(span) for span in traces.spans} == {TRACE}
    assert parent_of(traces.one(f"POST {ROUTE}")) == int(PARENT, 16)
    [envelope] = server.handle.envelopes
    assert envelope.trace["tracestate"] == "vendor=1"
    assert set(envelope.trace) == {"traceparent", "tracestate"}, "baggage is nobody's business"


async def test_a_caller_who_is_not_sampled_is_not_recorded(traces: Traces, server: Server) -> None:
    answer = await server.post(ROUTE, json=BODY, headers={"traceparent": f"{TRACEPARENT[:-1]}0"})
    assert answer.status_code == 200
    assert traces.spans == []


BAD = {
    "words": "hello",
    "too short": TRACEPARENT[:-1],
    "upper case": TRACEPARENT.upper(),
    "no trace": f"00-{'0' * 32}-{PARENT}-01",
    "no parent": f"00-{TRACE}-{'0' * 16}-01",
    "version ff": f"ff{TRACEPARENT[2:]}",
    "more of version 00": f"{TRACEPARENT}-more",
    "very long": f"01{TRACEPARENT[2:]}-{'x' * 9000}",
    "empty": "",
}


@pytest.mark.parametrize("header", BAD.values(), ids=BAD)
async def test_what_is_no_traceparent_begins_a_new_trace(traces: Traces, server: Server, header: str) -> None:
    answer = await server.post("/v1/files/none", headers={"traceparent": header, "tracestate": "a=1"})
    assert answer.status_code == 405
    [span] = traces.spans
    assert span.parent is None
    assert trace_of(span) != TRACE


async def test_two_traceparents_are_none(traces: Traces, server: Server) -> None:
    async with server.client() as client:
        await client.get("/v1/models", headers=[("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)])
    [span] = traces.spans
    assert span.parent is None


async def test_probes_and_the_page_are_not_traced(traces: Traces, server: Server) -> None:
    async with server.client() as client:
        for path in ("/health", "/", "/docs", "/openapi.json"):
            await client.get(path)
    assert traces.spans == []


async def test_nothing_that_the_caller_wrote_is_sent(traces: Traces, server: Server) -> None:
    async def fail(request: GenerationRequest) -> Media:
        raise GenerationFailedError(f"it cannot draw {request.arguments['prompt']}")

    key = "2026/11/29/secret-key.png"
    async with server.client() as client:
        headers = {"authorization": f"Bearer {SECRET}", "user-agent": SECRET}
        await client.post(f"{ROUTE}?signature={SECRET}", json=BODY, headers=headers)
        await client.get(f"/v1/files/{key}?X-Amz-Signature={SECRET}")
        server.make = fail
        assert (await client.post(ROUTE, json=BODY, headers=headers)).status_code == 500
        assert (await client.post(ROUTE, json=BODY | {"size": SECRET})).status_code == 400
    assert len(traces.spans) > 8
    for word in (*SECRET.split(), "secret-key", "Amz"):
        assert word not in traces.text, word


async def test_what_failed_says_its_class_and_a_callers_fault_is_no_error_of_the_server(
    traces: Traces, server: Server
) -> None:
    async def fail(request: GenerationRequest) -> Media:
        raise GenerationFailedError("no")

    server.make = fail
    assert (await server.post(ROUTE, json=BODY)).status_code == 500
    failed = {span.name: attributes_of(span)["error.type"] for span in traces.spans if not span.status.is_ok}
    assert failed == {f"POST {ROUTE}": "500"} | dict.fromkeys(("make", "decode"), "GenerationFailedError")
    traces.forget()
    assert (await server.post(ROUTE, json=BODY | {"n": 0})).status_code == 400
    assert traces.one(f"POST {ROUTE}").status.is_unset


async def test_equal_requests_that_share_a_generation_are_linked(traces: Traces, server: Server) -> None:
    going_on = asyncio.Event()

    async def wait(request: GenerationRequest) -> Media:
        await going_on.wait()
        return await make_at_once(request)

    server.make = wait
    first = asyncio.create_task(server.post(ROUTE, json=BODY))
    await until(lambda: len(server.requests) == 1)
    second = asyncio.create_task(server.post(ROUTE, json=BODY))
    await until(lambda: len(traces.named("read")) == 2)
    await asyncio.sleep(0.05)
    going_on.set()
    assert {(await each).status_code for each in (first, second)} == {200}
    own, joined = traces.named("make")
    assert len(traces.named("denoise")) == 1
    assert parent_of(traces.one("denoise")) == id_of(own)
    assert events_of(joined) == ["shared"]
    assert [link.context.span_id for link in joined.links] == [id_of(own)]
    assert trace_of(own) != trace_of(joined)


async def test_a_stream_is_open_until_its_last_event(traces: Traces, server: Server) -> None:
    body = BODY | {"stream": True, "partial_images": 1, "response_format": "b64_json"}
    answer = await server.post(ROUTE, json=body)
    assert answer.status_code == 200, answer.text
    request, denoise = traces.one(f"POST {ROUTE}"), traces.one("denoise")
    assert events_of(denoise) == ["preview"]
    assert parent_of(traces.one("make")) == id_of(request)
    assert (request.end_time or 0) > (traces.one("decode").end_time or 0)


async def test_storing_again_is_told(traces: Traces, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.storage.outputs.FIRST_PAUSE_S", 0.0)
    await server.open()
    store, failures = server.service.storage.store, [StorageError("full")]

    async def once(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return await store(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(server.service.storage, "store", once)
    assert (await server.post(ROUTE, json=BODY)).status_code == 200
    assert events_of(traces.one("store")) == ["storing failed"]
    assert attributes_of(traces.one("store"))["upload_pending"] is False
