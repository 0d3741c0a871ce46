"""The denoiser's work as a stream of events: the engine's thread makes them, the event loop reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any, Protocol

from deployments.messages import (
    Checkpoint,
    Conditioning,
    DecodeInputs,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    PayloadFollows,
    StageName,
)
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoiseRun, DenoisingFollower

StreamItem = DenoisingProgress | PayloadFollows | Checkpoint | DecodeInputs


class Observer(Protocol):
    """The replica: it owns the threads of requests, times and traces."""

    request_threads: Executor

    def observed(
        self, stage: StageName, request: GenerationRequest, arrived: float, *inputs: Any
    ) -> AbstractContextManager[tuple[Any, Any]]: ...


async def denoising_stream(
    replica: Observer,
    stage: DenoiserStage,
    request: GenerationRequest,
    envelope: Envelope,
    conditioning: Conditioning,
    checkpoint: Checkpoint | None = None,
) -> AsyncIterator[StreamItem]:
    """Progress after each step; checkpoints, previews and at last the inputs of the VAE stage, each announced.

    When nobody reads on (the caller hung up), the request is cancelled and leaves at its next forward.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[StreamItem, ...] | None] = asyncio.Queue()
    started: list[DenoiseRun] = []
    abandoned = False
    arrived = time.time()

    def emit(*items: StreamItem) -> None:
        loop.call_soon_threadsafe(events.put_nowait, items)

    def on_checkpoint(made: Checkpoint) -> None:
        emit(PayloadFollows("checkpoint", made.step), made)

    def on_preview(step: int, inputs: DecodeInputs) -> None:
        emit(PayloadFollows("preview", step), inputs)

    def on_start(run: DenoiseRun) -> None:
        started.append(run)
        if abandoned:
            stage.engine.cancel(run.fiber)

    def work() -> tuple[DecodeInputs, DenoiseRun, dict[str, float]]:
        with replica.observed("denoiser", request, arrived, conditioning) as (timing, trace):
            began = time.time()

            def on_progress(progress: DenoisingProgress) -> None:
                trace.step()
                if envelope.report_progress:
                    emit(progress)

            follower = DenoisingFollower(on_start, on_progress, on_checkpoint, on_preview)
            inputs, run = stage.denoise(request, conditioning, checkpoint, envelope, follower)
            timing.steps = run.session.steps_done - run.session.resumed_at
            timing.bytes_out = inputs.content.num_bytes
            seconds = {
                "denoiser_queue": began - arrived,
                "denoise": time.time() - began,
                "denoiser_forwards": run.fiber.seconds,
            }
            return inputs, run, seconds

    task = loop.run_in_executor(replica.request_threads, work)
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (items := await events.get()) is not None:
            for item in items:
                yield item
        inputs, run, seconds = await task
        yield PayloadFollows("decode_inputs", run.session.steps_done, seconds)
        yield inputs
    finally:
        abandoned = True
        for run in started:
            stage.engine.cancel(run.fiber)
        task.cancel()
