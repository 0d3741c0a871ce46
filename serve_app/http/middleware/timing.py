"""The headers of answers that say how long the caller waited and how long was computed."""

from __future__ import annotations

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.http.context import context_of


class AnswerHeaders:
    """ASGI middleware: `x-compute-seconds`, and `x-queue-seconds` for the rest of the time.

    `server-timing` (a W3C standard that browsers show) cuts the same time, in milliseconds, where the files were made:
    `make` is before, `answer` after it (the files are stored, the answer is written).
    `x-request-id` is set by Serve's proxy, on every answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = context_of(scope)

        async def send_with_seconds(message: Message) -> None:
            if message["type"] == "http.response.start" and context.compute_s is not None:
                headers = MutableHeaders(scope=message)
                now = time.perf_counter()
                waited_s = max(0.0, now - context.started - context.compute_s)
                make_ms, answer_ms = 1e3 * (context.made - context.started), 1e3 * (now - context.made)
                headers["x-queue-seconds"] = f"{waited_s:.3f}"
                headers["x-compute-seconds"] = f"{context.compute_s:.3f}"
                headers["server-timing"] = f"make;dur={make_ms:.3f}, answer;dur={answer_ms:.3f}"
            await send(message)

        await self.app(scope, receive, send_with_seconds)
