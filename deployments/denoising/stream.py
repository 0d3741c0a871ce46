"""The denoiser's work as a stream of events, made by a worker thread and read by the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from deployments.denoising.stage import DenoiserStage
from deployments.messages import Conditioning, DecodeInputs, DenoisingProgress, GenerationRequest, PayloadFollows
from deployments.stage_pipeline.denoise_session import DenoiseSession

InWorker = Callable[..., Awaitable[Any]]


async def denoising_stream(
    stage: DenoiserStage, in_worker: InWorker, request: GenerationRequest, conditioning: Conditioning
) -> AsyncIterator[DenoisingProgress | PayloadFollows | DecodeInputs]:
    """Progress after each step, an announcement, the inputs of the VAE stage.

    When nobody reads on (the caller hung up), the loop stops at its next forward.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[DenoisingProgress | None] = asyncio.Queue()
    sessions: list[DenoiseSession] = []
    abandoned = False

    def on_progress(step: int, num_steps: int) -> None:
        loop.call_soon_threadsafe(events.put_nowait, DenoisingProgress(step, num_steps))

    def on_session(session: DenoiseSession) -> None:
        session.cancelled = abandoned
        sessions.append(session)

    def work() -> tuple[DecodeInputs, float]:
        started = time.perf_counter()
        inputs = stage.denoise(request, conditioning, on_progress, on_session)
        return inputs, time.perf_counter() - started

    task = asyncio.ensure_future(in_worker(work))
    task.add_done_callback(lambda _: events.put_nowait(None))
    step = 0
    try:
        while (event := await events.get()) is not None:
            step = event.step
            yield event
        inputs, seconds = await task
        yield PayloadFollows("decode_inputs", seconds, step)
        yield inputs
    finally:
        abandoned = True
        for session in sessions:
            session.cancelled = True
