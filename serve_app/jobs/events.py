"""What happens to jobs as typed events, which a reader may leave and take up again.

However many readers there are, the store is asked once for all of them; a reader wakes for its own job only.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from serve_app.errors import JobNotFoundError, JobStoreAwayError
from serve_app.jobs.records import ENDED, Event, Story
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import StoreThreads, wait_for_change

logger = logging.getLogger(__name__)

POLL_S = 0.5  # between looks at jobs that other processes run
LOOK_PAUSE_S = 0.05  # between looks at jobs of this process: what happens meanwhile is seen in one look
AWAY_S = 1.0  # between tries while the store does not answer
KEEP_ALIVE_S = 15.0  # between signs of life on a quiet connection


@dataclass(frozen=True)
class JobEvent:
    """One event; without a `number` it does not move the reader's place. Without a `kind` it is a sign of life."""

    kind: str | None
    data: dict[str, Any]
    number: int | None = None


STILL_WORKING = JobEvent(None, {})


@dataclass(eq=False)
class Reader:
    """Somebody who follows a job."""

    news: deque[JobEvent] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, events: list[JobEvent]) -> None:
        self.news.extend(events)
        self.arrived.set()


@dataclass
class FollowedJob:
    """A job that somebody follows."""

    readers: set[Reader] = field(default_factory=set)
    told: int | None = None  # the last event that the readers were told of; None until one knows where the job stands
    position: int | None = None  # the last that they were told


class JobWatch:
    """Looks at the store for all readers of this process, as long as there are any."""

    def __init__(self, store: JobStore, threads: StoreThreads) -> None:
        self._store = store
        self._threads = threads
        self._jobs: dict[str, FollowedJob] = {}
        self._changed: set[str] = set()
        self._woken = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    def notify(self, job_id: str) -> None:
        """Something happened to a job in this process."""
        if job_id in self._jobs:
            self._changed.add(job_id)
            self._woken.set()

    async def events(self, job_id: str, after: int | None = 0) -> AsyncIterator[JobEvent]:
        """The events after number `after` (None: those to come), to the job's end. Its position in the queue comes
        without a number when it changes: it is not for reading again."""
        reader = Reader()
        self._enter(job_id, reader)
        try:
            while (story := await self._story(job_id, after)) is None:
                yield STILL_WORKING
                await asyncio.sleep(AWAY_S)
            if isinstance(story, JobEvent):
                yield story
                return
            self._job_stands_at(job_id, story.last_number)
            seen = story.last_number
            for each in story.events:
                yield _event(job_id, each)
            if story.has_ended:
                return
            position = story.position
            async for event in _news(reader):
                if event.number is None and event.kind == "queued":
                    before, position = position, event.data["position"]
                    if before in (None, position):
                        continue
                if event.number is not None and event.number <= seen:
                    continue
                yield event
                if event.kind in (*ENDED, "deleted"):
                    return
        finally:
            self._leave(job_id, reader)

    async def _story(self, job_id: str, after: int | None) -> Story | JobEvent | None:
        """None while the store does not answer."""
        try:
            return await self._threads.run(self._store.story, job_id, after)
        except JobNotFoundError:
            return JobEvent("deleted", {"id": job_id})
        except JobStoreAwayError:
            return None

    def _enter(self, job_id: str, reader: Reader) -> None:
        self._jobs.setdefault(job_id, FollowedJob()).readers.add(reader)
        if self._looking is None or self._looking.done():
            # An empty context: Serve cancels what belongs to the context of a request that has ended.
            self._looking = asyncio.get_running_loop().create_task(self._look_on(), context=contextvars.Context())

    def _job_stands_at(self, job_id: str, number: int) -> None:
        job = self._jobs[job_id]
        job.told = number if job.told is None else job.told

    def _leave(self, job_id: str, reader: Reader) -> None:
        job = self._jobs[job_id]
        job.readers.remove(reader)
        if not job.readers:
            del self._jobs[job_id]

    async def _look_on(self) -> None:
        all_seen_at = 0.0
        while self._jobs:
            await wait_for_change(self._woken, POLL_S)
            self._woken.clear()
            changed, self._changed = self._changed, set()
            if time.monotonic() - all_seen_at >= POLL_S:
                changed, all_seen_at = set(self._jobs), time.monotonic()
            try:
                await self._look(changed)
            except Exception:  # if this ended, readers would wait for ever
                logger.exception("the jobs that somebody follows could not be looked at; trying again")
                self._changed |= changed
                await asyncio.sleep(AWAY_S)
            await asyncio.sleep(LOOK_PAUSE_S)

    async def _look(self, job_ids: set[str]) -> None:
        told = {job_id: job.told for job_id, job in self._jobs.items() if job_id in job_ids}
        seen = {job_id: number for job_id, number in told.items() if number is not None}
        if not seen:
            return
        news = await self._threads.run(self._store.news, seen)
        for job_id in seen.keys() & self._jobs.keys():
            job, events = self._jobs[job_id], news.events.get(job_id, [])
            told_of = [_event(job_id, each) for each in events]
            if events:
                job.told = events[-1].number
            position = news.positions.get(job_id)
            if position not in (None, job.position):
                told_of.append(JobEvent("queued", {"id": job_id, "position": position}))
            job.position = position
            if job_id in news.gone:
                told_of.append(JobEvent("deleted", {"id": job_id}))
            for reader in job.readers if told_of else ():
                reader.tell(told_of)


async def _news(reader: Reader) -> AsyncIterator[JobEvent]:
    """What the reader is told, with signs of life between."""
    while True:
        await wait_for_change(reader.arrived, KEEP_ALIVE_S)
        reader.arrived.clear()
        if not reader.news:
            yield STILL_WORKING
        while reader.news:
            yield reader.news.popleft()


def _event(job_id: str, event: Event) -> JobEvent:
    return JobEvent(event.kind, {"id": job_id, "created_at": event.created_at, **event.data}, event.number)
