"""The headers of answers that say how long the caller waited and how long was computed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.messages import Media
from serve_app.making.admission import compute_seconds


@dataclass
class Spent:
    """What one HTTP request cost so far; `compute_s` is None until something was computed."""

    started: float
    compute_s: float | None = None
    made: float = 0.0  # time.perf_counter() when all was computed that was to be


_spent: ContextVar[Spent | None] = ContextVar("spent", default=None)


def count_compute(media: Iterable[Media]) -> None:
    """The device seconds of what this HTTP request had made go into its answer's headers."""
    if (spent := _spent.get()) is not None:
        spent.compute_s = (spent.compute_s or 0.0) + sum(compute_seconds(made.seconds) for made in media)
        spent.made = time.perf_counter()


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
        spent = Spent(time.perf_counter())
        _spent.set(spent)

        async def send_with_seconds(message: Message) -> None:
            if message["type"] == "http.response.start" and spent.compute_s is not None:
                headers = MutableHeaders(scope=message)
                now = time.perf_counter()
                waited_s = max(0.0, now - spent.started - spent.compute_s)
                make_ms, answer_ms = 1e3 * (spent.made - spent.started), 1e3 * (now - spent.made)
                headers["x-queue-seconds"] = f"{waited_s:.3f}"
                headers["x-compute-seconds"] = f"{spent.compute_s:.3f}"
                headers["server-timing"] = f"make;dur={make_ms:.3f}, answer;dur={answer_ms:.3f}"
            await send(message)

        await self.app(scope, receive, send_with_seconds)
