"""One JSON line for each request, which holds what every stage did for it (SGLANG_DIFFUSION_STAGE_LOGGING)."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deployments.adapters.use import named
from deployments.messages import STAGES, GenerationRequest, Media
from serve_app.errors import original_error
from serve_app.making.follower import Follower, Make
from serve_app.making.layers.layer import Layer, LayerContext
from serve_app.making.stages import Stages

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
SECONDS = ("queue_s", "transfer_s", "compute_s")


@dataclass
class RequestRecord:
    """What is known of one request when it ends."""

    request: GenerationRequest
    media: Media | None = None
    started: float = field(default_factory=time.time)
    outcome: str = "ok"  # or the class of the error


class RequestLog:
    """Appends to logs/requests.jsonl below the cache root of the ingress; each line is one write."""

    def __init__(self, cache_root: Path, stages: Stages) -> None:
        self.file = cache_root / "logs" / "requests.jsonl"
        self.stages = stages
        self.file.parent.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def record(self, request: GenerationRequest) -> AsyncIterator[RequestRecord]:
        """The caller fills in `media`; the line is written when the request ends, however it ends."""
        record = RequestRecord(request)
        try:
            yield record
        except BaseException as error:
            record.outcome = type(original_error(error) if isinstance(error, Exception) else error).__name__
            raise
        finally:
            ended = time.time()
            timings = await self._timings_of(request.request_id)
            line = describe(record, ended, timings, asked_s=time.time() - ended)
            await asyncio.to_thread(append_line, self.file, line)

    async def _timings_of(self, request_id: str) -> list[dict[str, Any]]:
        """From every replica; one that died takes its timings with it."""
        handles = self.stages.deployments().values()
        answers = await asyncio.gather(
            *(handle.broadcast("timings_of", request_id).results_async(timeout_s=TIMEOUT_S) for handle in handles),
            return_exceptions=True,
        )
        for lost in (answer for answer in answers if isinstance(answer, BaseException)):
            logger.warning("request %s: the timings of a deployment are missing: %r", request_id, lost)
        timings = [timing for answer in answers if isinstance(answer, list) for each in answer for timing in each]
        return sorted(timings, key=lambda timing: (STAGES.index(timing["stage"]), timing["started_at"]))


def describe(record: RequestRecord, ended: float, timings: list[dict[str, Any]], asked_s: float) -> str:
    """The line: who asked for what, how it ended, and queue, transfer, compute, steps and bytes of each stage.

    `asked_s`: seconds that the caller waited longer because the stages were asked for their timings.
    """
    request, media = record.request, record.media
    content = {
        "request_id": request.request_id,
        "model": request.model,
        "started_at": datetime.fromtimestamp(record.started, UTC).isoformat(timespec="milliseconds"),
        "loras": named(request.features),
        "outcome": record.outcome,
        "total_s": ended - record.started,
        "in_stages_s": sum(timing[name] for timing in timings for name in SECONDS),
        "asked_s": asked_s,
        "seconds": media.seconds if media else {},
        "file_bytes": sum(len(file.data) for file in media.files) if media else 0,
        "stages": [{k: v for k, v in timing.items() if k != "request_id"} for timing in timings],
    }
    return json.dumps(content)


def append_line(file: Path, line: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def log_what_is_made(make: Make, context: LayerContext) -> Make:
    """Only with SGLANG_DIFFUSION_STAGE_LOGGING."""
    if not context.env.runtime.stage_logging:
        return make
    log = RequestLog(context.env.runtime.cache_root, context.stages)

    async def make_and_log(request: GenerationRequest, follower: Follower) -> Media:
        async with log.record(request) as record:
            record.media = await make(request, follower)
            return record.media

    return make_and_log


REQUEST_LOG = Layer("request_log", log_what_is_made)
