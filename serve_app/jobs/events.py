"""What happens to a job as typed events, which a reader may leave and take up again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from serve_app.errors import JobNotFoundError
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import Changes, StoreThreads, wait_for_change

POLL_S = 0.5  # between looks at a job that another process runs
KEEP_ALIVE_S = 15.0  # between signs of life on a quiet connection


@dataclass(frozen=True)
class JobEvent:
    """One event; without a `number` it does not move the reader's place. Without a `kind` it is a sign of life."""

    kind: str | None
    data: dict[str, Any]
    number: int | None = None


STILL_WORKING = JobEvent(None, {})


async def job_events(
    store: JobStore, threads: StoreThreads, changes: Changes, job_id: str, after: int = 0
) -> AsyncIterator[JobEvent]:
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
            yield JobEvent("deleted", {"id": job_id})
            return
        news = [
            JobEvent(each.kind, {"id": job_id, "created_at": each.created_at, **each.data}, each.number)
            for each in events
        ]
        if before is not None and position is not None and position != before:
            news.append(JobEvent("queued", {"id": job_id, "position": position}))
        if time.monotonic() - quiet_since > KEEP_ALIVE_S:
            news.append(STILL_WORKING)
        for event in news:
            yield event
            quiet_since = time.monotonic()
        if job.has_ended:
            return
        after = events[-1].number if events else after
        await wait_for_change(change, POLL_S)
