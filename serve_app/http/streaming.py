"""Pictures as server-sent events, in the shape that OpenAI's client reads with `stream=True`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, Literal

from fastapi.responses import StreamingResponse

from deployments.messages import GenerationRequest, Media, MediaFile, Usage
from serve_app.errors import JobNotFoundError, report_error
from serve_app.http.answers import UsageAnswer, background_of, usages_of
from serve_app.http.errors import error_content
from serve_app.http.sse import KEEP_ALIVE, rounded, sse_event
from serve_app.jobs.codec import error_from_json
from serve_app.jobs.records import Job, Output
from serve_app.jobs.service import Jobs
from serve_app.making.at_once import Tasks
from serve_app.making.follower import Follower
from serve_app.storage.base import StorageBackend

StreamPrefix = Literal["image_generation", "image_edit"]

KEEP_ALIVE_S = 15.0  # between comments that keep proxies from closing a quiet connection


class PartialPictures:
    """Pictures that are not done, until somebody has the time to send them."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[GenerationRequest, int, Media]] = deque()  # with their numbers: 0, 1 ... of a request
        self.waits: dict[str, float | None] = {}  # what is waited for, and about how many seconds; not yet told
        self.arrived = asyncio.Event()
        self._made: Counter[str] = Counter()

    def wait(self, what_for: str, about_s: float | None) -> None:
        self.waits[what_for] = about_s
        self.arrived.set()

    def add(self, request: GenerationRequest, media: Media) -> None:
        self.waiting.append((request, self._made[request.request_id], media))
        self._made[request.request_id] += 1
        self.arrived.set()


class PartialPictureFollower(Follower):
    """Adds the previews of one request to the partial pictures."""

    def __init__(self, partials: PartialPictures, request: GenerationRequest, previews: int) -> None:
        self.partials = partials
        self.request = request
        self.previews = previews

    def on_wait(self, what_for: str, about_s: float | None = None) -> None:
        self.partials.wait(what_for, about_s)

    def on_preview(self, step: int, media: Media) -> None:
        self.partials.add(self.request, media)


async def picture_events(
    prefix: StreamPrefix,
    tasks: Tasks,
    partials: PartialPictures,
    keep_alive_s: float = KEEP_ALIVE_S,
    end_user: str | None = None,
) -> AsyncIterator[bytes]:
    """A `partial_image` event for each preview and a `completed` event for each picture, as they come.

    A `waiting` event says that a model is loaded first, or that a device is full. A failure ends the stream with an
    `error` event; when the caller hangs up, what is under way is cancelled.
    """
    pending = set(tasks)
    try:
        while pending:
            arrival = asyncio.ensure_future(partials.arrived.wait())
            done, _ = await asyncio.wait({*pending, arrival}, timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
            arrival.cancel()
            partials.arrived.clear()
            if not done:
                yield KEEP_ALIVE
            while partials.waits:
                yield _waiting(prefix, *partials.waits.popitem())
            while partials.waiting:
                request, number, media = partials.waiting.popleft()
                for event in _partial(prefix, request, number, media):
                    yield event
            for task in pending & done:
                pending.discard(task)
                failure = task.exception()
                if isinstance(failure, Exception):
                    yield sse_event("error", error_content(report_error(failure)))
                    return
                for event in _completed(prefix, tasks[task], task.result(), end_user):
                    yield event
    finally:
        for task in tasks:
            task.cancel()  # of no effect on those that are done


async def picture_events_of_job(
    prefix: StreamPrefix, jobs: Jobs, storage: StorageBackend, job: Job
) -> AsyncIterator[bytes]:
    """The same events of a job, from its first on, whoever asked for it; it goes on when the caller hangs up.

    Its partial pictures are the small ones that a job keeps. Where the job or its files cannot be read, the stream
    ends with an `error` event too.
    """
    try:
        async for event in _events_of_job(prefix, jobs, storage, job):
            yield event
    except Exception as failure:  # noqa: BLE001  (whatever it is, the caller is told)
        yield sse_event("error", error_content(report_error(failure, job.id)))


async def _events_of_job(prefix: StreamPrefix, jobs: Jobs, storage: StorageBackend, job: Job) -> AsyncIterator[bytes]:
    shown: Counter[int] = Counter()
    async for event in jobs.events(job.id, 0):
        if event.kind is None:
            yield KEEP_ALIVE
        elif event.kind == "preview":
            number = event.data["request"]
            small = {name: event.data[name] for name in ("b64_json", "output_format", "size")}
            yield _event(
                f"{prefix}.partial_image",
                small | {"background": background_of(job), "partial_image_index": shown[number]},
            )
            shown[number] += 1
        elif event.kind == "waiting":
            yield _waiting(prefix, event.data["for"], event.data.get("about_s"))
        elif event.kind == "stored":
            made = await jobs.get(job.id, job.owner)
            for output in made.outputs:
                if output.request == event.data["request"]:
                    yield _event(f"{prefix}.completed", await _stored(made, output, storage))
        elif event.kind in ("failed", "cancelled"):
            yield sse_event("error", error_content(error_from_json(event.data["error"])))
        elif event.kind == "deleted":
            yield sse_event("error", error_content(report_error(JobNotFoundError("the job was deleted"))))


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """The answer that sends them as they come, past proxies that would collect them."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _partial(prefix: StreamPrefix, request: GenerationRequest, number: int, media: Media) -> list[bytes]:
    kind = f"{prefix}.partial_image"
    return [_event(kind, _file(request, file) | {"partial_image_index": number}) for file in media.files]


def _waiting(prefix: StreamPrefix, what_for: str, about_s: float | None) -> bytes:
    kind = f"{prefix}.waiting"
    told = {"type": kind, "created_at": int(time.time()), "for": what_for, "about_s": rounded(about_s)}
    return sse_event(kind, told)


def _completed(prefix: StreamPrefix, request: GenerationRequest, media: Media, end_user: str | None) -> list[bytes]:
    usage = UsageAnswer.of([media.usage]).model_dump()
    more = {
        "usage": usage,
        "safety_identifier": end_user,
        "timings": media.seconds,
        "steps": media.num_steps,
        "warnings": [asdict(warning) for warning in media.warnings],
    }
    return [_event(f"{prefix}.completed", _file(request, file) | more) for file in media.files]


def _file(request: GenerationRequest, file: MediaFile) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(file.data).decode(),
        "size": f"{file.width}x{file.height}",
        "output_format": request.output.format,
        "background": request.output.background,
        "seed": request.seed,
    }


async def _stored(job: Job, output: Output, storage: StorageBackend) -> dict[str, Any]:
    data, _ = await storage.load(output.key)
    usage = usages_of(job).get(str(output.request), Usage())
    return {
        "b64_json": base64.b64encode(data).decode(),
        "size": f"{output.width}x{output.height}",
        "output_format": job.asked.output_format,
        "seed": output.seed,
        "background": background_of(job),
        "usage": UsageAnswer.of([usage]).model_dump(),
        "safety_identifier": job.shown.get("safety_identifier"),
        "timings": job.timings[str(output.request)],
        "steps": output.num_steps,
        "warnings": [asdict(warning) for warning in job.warnings],
    }


def _event(kind: str, picture: dict[str, Any]) -> bytes:
    told = {"type": kind, "created_at": int(time.time()), "quality": "auto"}
    return sse_event(kind, told | picture)
