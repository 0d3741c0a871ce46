"""Around Ray Serve's proxy: the answers that Serve gives in its own words, in OpenAI's shape.

A replica of the ingress that dies in the middle of a request is among them: Serve's own answer is a bare 500.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import RETRY_AFTER_S, ErrorReport
from serve_app.http.errors import error_response

SERVE_PATHS = ("/-/healthz", "/-/routes")  # read by programs that know Serve's words
NO_ROUTE = b"Ping http://.../-/routes for available routes."
LOST = ErrorReport(
    503,
    "server_error",
    "the process that was answering was lost; try again (with the same Idempotency-Key, if there was one)",
    "ingress_lost",
    None,
    RETRY_AFTER_S,
)
KINDS = {
    408: ErrorReport(408, "server_error", "the time that Serve gives a request was over", "request_timeout"),
    429: ErrorReport(
        429, "rate_limit_error", "too many requests; try again later", "rate_limit_exceeded", None, RETRY_AFTER_S
    ),
    503: ErrorReport(
        503,
        "server_error",
        "the application is starting or was lost; try again",
        "stage_unavailable",
        None,
        RETRY_AFTER_S,
    ),
}


class ServeErrors:
    """ASGI middleware: Serve's own answers are replaced, those of applications pass as they come."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in SERVE_PATHS:
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        await self.app(scope, receive, answer.send)
        if not answer.has_started:
            await answer.replace(LOST)


class _Answer:
    """One answer on its way; the head of one that may be Serve's own waits for its body."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self._send = send
        self._head: Message | None = None
        self.has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            if _may_be_serves(message):
                self._head = message
                return
        elif self._head is not None:
            head, self._head = self._head, None
            report = _report_of(self.scope, head, message)
            if report is not None:
                await self.replace(report, Headers(raw=head["headers"]).get("retry-after"))
                return
            await self._send(head)
        await self._send(message)

    async def replace(self, report: ErrorReport, retry_after: str | None = None) -> None:
        answer = error_response(report)
        if retry_after is not None:
            answer.headers["Retry-After"] = retry_after
        request_id = Headers(scope=self.scope).get("x-request-id")  # Serve has put it there
        if request_id is not None:
            MutableHeaders(raw=answer.raw_headers)["x-request-id"] = request_id
        await answer(self.scope, self.receive, self._send)


def _may_be_serves(head: Message) -> bool:
    is_text = Headers(raw=head["headers"]).get("content-type", "").startswith("text/plain")
    return is_text and (head["status"] == 404 or head["status"] in KINDS)


def _report_of(scope: Scope, head: Message, body: Message) -> ErrorReport | None:
    """None for an answer that is not Serve's."""
    if body.get("more_body", False):  # Serve's own come in one piece
        return None
    if head["status"] != 404:
        return KINDS[head["status"]]
    if not body.get("body", b"").endswith(NO_ROUTE):
        return None
    message = f"{scope['method']} {scope['path']}: no application is served here"
    return ErrorReport(404, "invalid_request_error", message, "not_found")
