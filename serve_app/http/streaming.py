"""Pictures as server-sent events, in the shape that OpenAI's client reads with `stream=True`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any, Literal

from deployments.messages import GenerationRequest, Media, MediaFile
from serve_app.errors import report_error
from serve_app.http.errors import error_content
from serve_app.http.sse import KEEP_ALIVE, sse_event
from serve_app.making.at_once import Tasks
from serve_app.making.follower import Follower

StreamPrefix = Literal["image_generation", "image_edit"]

KEEP_ALIVE_S = 15.0  # between comments that keep proxies from closing a quiet connection
NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


class PartialPictures:
    """Pictures that are not done, until somebody has the time to send them."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[GenerationRequest, int, Media]] = deque()  # with their numbers: 0, 1 ... of a request
        self.arrived = asyncio.Event()
        self._made: Counter[str] = Counter()

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

    def on_preview(self, step: int, media: Media) -> None:
        self.partials.add(self.request, media)


async def picture_events(
    prefix: StreamPrefix, tasks: Tasks, partials: PartialPictures, keep_alive_s: float = KEEP_ALIVE_S
) -> AsyncIterator[bytes]:
    """A `partial_image` event for each preview and a `completed` event for each picture, as they come.

    A failure ends the stream with an `error` event; when the caller hangs up, what is under way is cancelled.
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
            while partials.waiting:
                request, number, media = partials.waiting.popleft()
                for event in _partial(prefix, request, number, media):
                    yield sse_event(event["type"], event)
            for task in pending & done:
                pending.discard(task)
                failure = task.exception()
                if isinstance(failure, Exception):
                    yield sse_event("error", error_content(report_error(failure)))
                    return
                for event in _completed(prefix, tasks[task], task.result()):
                    yield sse_event(event["type"], event)
    finally:
        for task in tasks:
            task.cancel()  # of no effect on those that are done


def _partial(prefix: StreamPrefix, request: GenerationRequest, number: int, media: Media) -> list[dict[str, Any]]:
    return [
        _picture(f"{prefix}.partial_image", request, file) | {"partial_image_index": number} for file in media.files
    ]


def _completed(prefix: StreamPrefix, request: GenerationRequest, media: Media) -> list[dict[str, Any]]:
    return [
        _picture(f"{prefix}.completed", request, file)
        | {"usage": NO_TOKENS, "timings": media.seconds, "steps": media.num_steps}  # tokens: nothing is billed here
        | {"warnings": [asdict(warning) for warning in media.warnings]}
        for file in media.files
    ]


def _picture(kind: str, request: GenerationRequest, file: MediaFile) -> dict[str, Any]:
    return {
        "type": kind,
        "b64_json": base64.b64encode(file.data).decode(),
        "created_at": int(time.time()),
        "size": f"{file.width}x{file.height}",
        "output_format": request.output.format,
        "quality": "auto",
        "background": "opaque",
        "seed": request.seed,
    }
