"""The span of an HTTP request, which continues the caller's trace (W3C's `traceparent` and `tracestate`)."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import tracing
from deployments.tracing import Carrier
from serve_app.http.context import context_of

TRACED = "/v1/"  # not the page, nor the questions of probes
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "QUERY")
TRACE_HEADERS = ("traceparent", "tracestate")
LONGEST_ID = 128  # characters of a caller's own `x-request-id`
FILES = "/v1/files/"  # whoever has such an address may have the file: its path is no part of a trace


class Traces:
    """ASGI middleware, only where traces are on. No query, no header and no body is a part of a span."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not path.startswith(TRACED):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")[:LONGEST_ID] or None
        with tracing.begun("request", carrier_of(headers), http_request_id=request_id) as span:
            method = scope["method"] if scope["method"] in METHODS else "_OTHER"
            span.set_standard({"http.request.method": method, "url.scheme": scope.get("scheme", "http")})

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_standard({"http.response.status_code": message["status"]})
                    if message["status"] >= 500:
                        span.fail(str(message["status"]))
                await send(message)

            try:
                await self.app(scope, receive, send_and_note)
            finally:
                route = getattr(scope.get("route"), "path", None)
                span.rename(f"{method} {route}" if route else method)
                span.set_standard({"url.path": FILES if path.startswith(FILES) else path})
                span.set_standard(dict(_where(scope)) | ({"http.route": route} if route else {}))


def carrier_of(headers: Headers) -> Carrier:
    """What the caller's trace is; more than one `traceparent` is none, and without one `tracestate` says nothing."""
    parents, states = (headers.getlist(name) for name in TRACE_HEADERS)
    if len(parents) != 1:
        return {}
    return {"traceparent": parents[0]} | ({"tracestate": ",".join(states)} if states else {})


def _where(scope: Scope) -> Iterator[tuple[str, str | int]]:
    asked = urlsplit(context_of(scope).asked_at)
    if asked.hostname:
        yield "server.address", asked.hostname
        yield "server.port", asked.port or {"http": 80, "https": 443}.get(asked.scheme, 80)
