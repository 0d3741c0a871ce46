"""Server-sent events as bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

from serve_app.jobs.events import JobEvent

KEEP_ALIVE = b": still working\n\n"  # a comment, so that proxies do not close a quiet connection


def sse_event(kind: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """One event; without a number it does not move the reader's Last-Event-ID."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def rounded(about_s: float | None) -> int | None:
    """Seconds that are only predicted."""
    return None if about_s is None else math.ceil(about_s)


async def sse_of_job(events: AsyncIterator[JobEvent]) -> AsyncIterator[bytes]:
    """A job's events as they come."""
    async for event in events:
        yield KEEP_ALIVE if event.kind is None else sse_event(event.kind, event.data, event.number)
