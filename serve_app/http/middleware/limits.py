"""How much HTTP a replica takes: `BodySizeLimit` bounds bytes, `RoomForRequests` how many are answered at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.metrics.meter import NO_METER, Meter
from serve_app.errors import OverloadedError, report_error
from serve_app.http.context import context_of
from serve_app.http.errors import error_response

MAX_DIGITS = 18  # of a length that is announced
MAX_BODY_S = 120.0  # from the first to the last byte of a body
MAX_PAUSE_S = 20.0  # between two pieces of it
MAX_BODY_BYTES_AT_ONCE = 1_000_000_000  # of the bodies of all requests that an ingress replica is answering
MAX_REQUESTS_AT_ONCE = 1_000  # that an ingress replica is answering: those that wait, and those who follow events

# Serve refuses nothing that is beyond a deployment's max_ongoing_requests: it waits in Serve's proxy, by default any
# number for any time, and a GET /health behind it. Serve's own bound of that (max_queued_requests) is answered by the
# proxy, in plain text, with a constant Retry-After at best. So Serve is never to reach its limit: RoomForRequests
# refuses before, at once, as OpenAI's clients understand it, and with the time that the queue needs. What lies between
# the two numbers is room for these refusals and for questions about health.
SERVE_MAX_ONGOING_REQUESTS = 10 * MAX_REQUESTS_AT_ONCE


Overloaded = Callable[[str], OverloadedError]


class BodySizeLimit:
    """ASGI middleware: a body that is too large is a 413 and one that is too slow a 408; neither is read on.

    FastAPI's own `max_body_size` answers in plain text; this one leaves the answer to the error handlers.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int = MAX_BODY_BYTES_AT_ONCE,
        max_body_s: float = MAX_BODY_S,
        max_pause_s: float = MAX_PAUSE_S,
        max_bytes_at_once: int = MAX_BODY_BYTES_AT_ONCE,
        meter: Meter = NO_METER,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_body_s = max_body_s
        self.max_pause_s = max_pause_s
        self.max_bytes_at_once = max_bytes_at_once
        self.meter = meter
        self.num_bytes = 0  # of the bodies of all requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > MAX_DIGITS or int(announced) > self.max_body_bytes):
            await self.app(scope, self._refuse, send)
            return
        num_bytes = 0
        is_complete = False
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self.max_body_s

        async def receive_within_limit() -> Message:
            nonlocal num_bytes, is_complete
            if is_complete:  # what comes now is the caller's hanging up, any time later
                return await receive()
            try:
                async with asyncio.timeout_at(min(give_up, loop.time() + self.max_pause_s)):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, "the body came too slowly") from error
            is_complete = not message.get("more_body", False)
            num_bytes += len(message.get("body", b""))
            self.num_bytes += len(message.get("body", b""))
            context_of(scope).body_bytes = num_bytes
            if self.num_bytes > self.max_bytes_at_once:
                self.meter.count("triptych_requests_refused_total", reason="bodies_at_once")
                raise HTTPException(429, "too many large bodies at once; try again in 5 s", {"Retry-After": "5"})
            return message if num_bytes <= self.max_body_bytes else await self._refuse()

        try:
            await self.app(scope, receive_within_limit, send)
        finally:
            self.num_bytes -= num_bytes

    async def _refuse(self) -> Message:
        # FastAPI passes an HTTPException on that is raised while it reads the body.
        raise HTTPException(413, too_large(self.max_body_bytes))


def too_large(max_body_bytes: int) -> str:
    return f"the body may have at most {max_body_bytes} bytes"


class RoomForRequests:
    """ASGI middleware: beyond `max_requests` at a time the answer is 429, before a byte of the body is read."""

    def __init__(
        self,
        app: ASGIApp,
        overloaded: Overloaded,
        max_requests: int = MAX_REQUESTS_AT_ONCE,
        meter: Meter = NO_METER,
    ) -> None:
        """`overloaded`: the refusal that says when there should be room, for a reason."""
        self.app = app
        self.overloaded = overloaded
        self.max_requests = max_requests
        self.meter = meter
        self.num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].endswith("/health"):
            await self.app(scope, receive, send)
            return
        if self.num_requests >= self.max_requests:
            self.meter.count("triptych_requests_refused_total", reason="requests_at_once")
            refusal = report_error(self.overloaded("too many requests at once"))
            await error_response(refusal)(scope, receive, send)
            return
        self.num_requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.num_requests -= 1
