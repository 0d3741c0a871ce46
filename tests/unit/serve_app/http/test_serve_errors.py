"""What Serve's proxy says in its own words comes in OpenAI's shape; what applications say passes as it is."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import (
    RequestIdMiddleware,
    convert_object_to_asgi_messages,
    get_http_response_status,
    send_http_response_on_exception,
    validate_http_proxy_callback_return,
)
from ray.serve._private.utils import call_function_from_import_path
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from env_config.ray_proxy import AROUND_PROXY
from serve_app.http.middleware.serve_errors import ServeErrors
from serve_app.proxy import around_proxy
from tests.support.in_process import serving

NO_ROUTE = "Path '/x' not found. Ping http://.../-/routes for available routes."


class Proxy:
    """Serve's proxy, as far as its answers to failures go: the same functions make them."""

    def __init__(self, failure: BaseException | None = None, words: str = "", after_start: bool = False) -> None:
        self.failure = failure
        self.words = words
        self.after_start = after_start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.failure is None:
            for message in convert_object_to_asgi_messages(self.words, status_code=404):
                await send(message)
            return
        if self.after_start:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
        status = get_http_response_status(self.failure, None, "r")
        for message in send_http_response_on_exception(status, self.after_start):
            await send(message)


async def answer(app: ASGIApp, path: str = "/x") -> httpx.Response:
    wrapped = ServeErrors(RequestIdMiddleware(app))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(wrapped), base_url="http://test") as client:
        return await client.get(path)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (RayServeException("the replica died"), 503, "ingress_lost"),
        (DeploymentUnavailableError.__new__(DeploymentUnavailableError), 503, "stage_unavailable"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 503, "stage_unavailable"),
        (TimeoutError(), 408, "request_timeout"),
    ],
    ids=["replica lost", "deployment unavailable", "back pressure", "time-out"],
)
async def test_each_failure_of_serve_is_an_error_that_openais_clients_read(
    failure: Exception, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeploymentUnavailableError, "message", "the deployment is unavailable")
    told = await answer(Proxy(failure))
    error = told.json()["error"]
    assert (told.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert told.headers["content-type"] == "application/json"
    assert ("retry-after" in told.headers) == (status == 503)
    assert told.headers["x-request-id"]


async def test_the_retry_after_that_serve_was_told_stays() -> None:
    failure = BackPressureError(num_queued_requests=1, max_queued_requests=1, status_code=429, retry_after_s=7)
    told = await answer(Proxy(failure))
    assert (told.status_code, told.headers["retry-after"]) == (429, "7")
    assert told.json()["error"]["code"] == "rate_limit_exceeded"


async def test_a_path_of_no_application_is_a_404_that_openais_clients_read() -> None:
    told = await answer(Proxy(words=NO_ROUTE))
    assert (told.status_code, told.json()["error"]["code"]) == (404, "not_found")
    assert "/x" in told.json()["error"]["message"]


async def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = ServeErrors(Proxy(RayServeException("the replica died"), after_start=True))
    await app({"type": "http", "path": "/x", "headers": []}, send, send)  # type: ignore[arg-type]
    assert [each["type"] for each in sent] == ["http.response.start", "http.response.body"]


@pytest.mark.parametrize("path", ["/-/healthz", "/-/routes"])
async def test_serves_own_paths_keep_serves_words(path: str) -> None:
    told = await answer(Proxy(words=NO_ROUTE), path)
    assert (told.status_code, told.text) == (404, NO_ROUTE)


async def test_what_an_application_says_passes_as_it_is() -> None:
    async def pieces() -> Any:
        yield b"one "
        yield b"two"

    texts: list[ASGIApp] = [
        PlainTextResponse("no such thing", 404),
        PlainTextResponse("Disallowed CORS origin", 400),
        PlainTextResponse("Internal Server Error", 500),
        StreamingResponse(pieces(), 503, media_type="text/plain"),
    ]
    told = [await answer(text) for text in texts]
    assert [each.status_code for each in told] == [404, 400, 500, 503]
    assert [each.text for each in told] == [
        "no such thing", "Disallowed CORS origin", "Internal Server Error", "one two"
    ]  # fmt: skip


async def test_errors_of_the_application_itself_pass_as_they_are(tmp_path: Any) -> None:
    with serving(tmp_path) as server:
        plain = await server.post("/v1/images/generations", json={"prompt": 1})
        transport = httpx.ASGITransport(ServeErrors(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            wrapped = await client.post("/v1/images/generations", json={"prompt": 1})
    assert (wrapped.status_code, json.loads(wrapped.text)) == (plain.status_code, plain.json())


def test_the_name_that_the_launcher_gives_to_ray_is_that_of_the_wrapper() -> None:
    called = validate_http_proxy_callback_return(call_function_from_import_path(AROUND_PROXY))
    assert [each.cls for each in called] == [each.cls for each in around_proxy()] == [ServeErrors]
