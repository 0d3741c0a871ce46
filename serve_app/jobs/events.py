"""What happens to a job as server-sent events, which a reader may leave and take up again."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from serve_app.jobs.records import Event, JobNotFoundError
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import Changes, StoreThreads, wait_for_change

POLL_S = 0.5  # between looks at a job that another process runs
KEEP_ALIVE_S = 15.0  # between comments that keep proxies from closing a quiet connection


async def job_events(
    store: JobStore, threads: StoreThreads, changes: Changes, job_id: str, after: int = 0
) -> AsyncIterator[bytes]:
    """The events after number `after`, to the job's end. The position in the queue comes without a number
    when it changes: it is not for reading again."""
    position: int | None = None
    quiet_since = time.monotonic()
    while True:
        change = changes.next()
        try:
            # The job is read first: what happens after it has ended is nothing.
            job = await threads.run(store.get, job_id)
            events = await threads.run(store.events_after, job_id, after)
            before, position = position, await threads.run(store.queue_position, job_id)
        except JobNotFoundError:
            yield sse_event("deleted", {"id": job_id})
            return
        lines = [_numbered(job_id, event) for event in events]
        if before is not None and position is not None and position != before:
            lines.append(sse_event("queued", {"id": job_id, "position": position}))
        if time.monotonic() - quiet_since > KEEP_ALIVE_S:
            lines.append(b": still working\n\n")
        for line in lines:
            yield line
            quiet_since = time.monotonic()
        if job.has_ended:
            return
        after = events[-1].number if events else after
        await wait_for_change(change, POLL_S)


def _numbered(job_id: str, event: Event) -> bytes:
    return sse_event(event.kind, {"id": job_id, "created_at": event.created_at, **event.data}, event.number)


def sse_event(kind: str, data: dict[str, Any], number: int | None = None) -> bytes:
    """One event; without a number it does not move the reader's Last-Event-ID."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()
