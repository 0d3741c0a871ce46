"""The denoiser's work as a stream of events: the engine's thread makes them, the event loop reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Protocol

from deployments.messages import (
    Checkpoint,
    Conditioning,
    DecodeInputs,
    DenoisingBegun,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    PayloadFollows,
    RequestWarning,
)
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoiseRun, DenoisingFollower
from deployments.stages.denoise_trace import traced
from deployments.tracing import Span

StreamItem = DenoisingBegun | DenoisingProgress | RequestWarning | PayloadFollows | Checkpoint | DecodeInputs


class Work(Protocol):
    """What the replica's observers are told of the request while it runs."""

    steps: int
    bytes_out: int

    @property
    def span(self) -> Span: ...

    def step(self) -> None: ...


class Threads(Protocol):
    """The threads of requests, and what observes the work in them."""

    request_threads: Executor

    def observed_denoising(
        self, request: GenerationRequest, envelope: Envelope, arrived: float, conditioning: Conditioning
    ) -> AbstractContextManager[Work]: ...


async def denoising_stream(
    threads: Threads,
    stage: DenoiserStage,
    request: GenerationRequest,
    envelope: Envelope,
    conditioning: Conditioning,
    checkpoint: Checkpoint | None = None,
) -> AsyncIterator[StreamItem]:
    """Its beginning, progress after each step; checkpoints, previews, at last the inputs of the VAE stage, announced.

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
        emit(DenoisingBegun(), *run.warnings)
        if abandoned:
            stage.engine.cancel(run.fiber)

    def work() -> tuple[DecodeInputs, DenoiseRun, dict[str, float]]:
        with threads.observed_denoising(request, envelope, arrived, conditioning) as observed:
            began = time.time()

            def on_progress(progress: DenoisingProgress) -> None:
                observed.step()
                if envelope.report_progress:
                    emit(progress)

            follower = DenoisingFollower(on_start, on_progress, on_checkpoint, on_preview)
            with traced(follower, observed.span) as told:
                inputs, run = stage.denoise(request, conditioning, checkpoint, envelope, told)
            observed.steps = run.session.steps_done - run.session.resumed_at
            observed.bytes_out = inputs.content.num_bytes
            seconds = {
                "denoiser_queue": began - arrived,
                "denoise": time.time() - began,
                "denoiser_forwards": run.fiber.seconds,
            }
            return inputs, run, seconds

    task = loop.run_in_executor(threads.request_threads, work)
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        for warning in conditioning.warnings:
            yield warning
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
