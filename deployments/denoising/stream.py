"""The denoiser's work as a stream of events: a thread of the request makes them, the event loop reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor

from deployments.denoising.stage import DenoiserStage, Denoising
from deployments.messages import (
    Checkpoint,
    Conditioning,
    DecodeInputs,
    DenoisingProgress,
    GenerationRequest,
    PayloadFollows,
)

StreamItem = DenoisingProgress | PayloadFollows | Checkpoint | DecodeInputs


async def denoising_stream(
    stage: DenoiserStage,
    threads: Executor,
    request: GenerationRequest,
    conditioning: Conditioning,
    checkpoint: Checkpoint | None = None,
) -> AsyncIterator[StreamItem]:
    """Progress after each step; checkpoints and at last the inputs of the VAE stage, each after its announcement.

    When nobody reads on (the caller hung up), the request is cancelled and leaves at its next forward.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[DenoisingProgress | Checkpoint | None] = asyncio.Queue()
    started: list[Denoising] = []
    abandoned = False
    queued = time.perf_counter()

    def emit(event: DenoisingProgress | Checkpoint) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    def on_start(denoising: Denoising) -> None:
        started.append(denoising)
        if abandoned:
            stage.engine.cancel(denoising.job)

    def work() -> tuple[DecodeInputs, Denoising, dict[str, float]]:
        began = time.perf_counter()
        inputs, denoising = stage.denoise(request, conditioning, checkpoint, emit, emit, on_start)
        seconds = {
            "denoiser_queue": began - queued,
            "denoise": time.perf_counter() - began,
            "denoiser_forwards": denoising.job.seconds,
        }
        return inputs, denoising, seconds

    task = loop.run_in_executor(threads, work)
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            if isinstance(event, Checkpoint):
                yield PayloadFollows("checkpoint", event.step)
            yield event
        inputs, denoising, seconds = await task
        yield PayloadFollows("decode_inputs", denoising.session.steps_done, seconds)
        yield inputs
    finally:
        abandoned = True
        for denoising in started:
            stage.engine.cancel(denoising.job)
        task.cancel()
