"""The denoiser's stream: the order of its items, and what happens when nobody reads on."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engine.fiber import CancelledStage, Fiber
from deployments.messages import (
    Checkpoint,
    Conditioning,
    DecodeInputs,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    OutputFormat,
    Packed,
    PayloadFollows,
)
from deployments.stages.denoise_stream import denoising_stream
from deployments.tracing import NO_SPAN

PATIENCE_S = 30
STEPS = 3
EMPTY = Packed([], ())
REQUEST = GenerationRequest("r", "model", {}, 0, OutputFormat("image", "png"))


class PlayedThreads:
    """The threads of requests, which note what is observed in them."""

    def __init__(self) -> None:
        self.request_threads = ThreadPoolExecutor(2)
        self.steps, self.bytes_out = 0, -1
        self.traced_steps = 0
        self.outcome = ""
        self.span = NO_SPAN

    @contextmanager
    def observed_denoising(self, request: Any, envelope: Any, arrived: float, conditioning: Any) -> Iterator[Any]:
        try:
            yield self
            self.outcome = "ok"
        except BaseException as error:
            self.outcome = type(error).__name__
            raise

    def step(self) -> None:
        self.traced_steps += 1


class PlayedEngine:
    """Cancels as the engine does: the fiber notices at its next forward."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def cancel(self, fiber: Fiber) -> None:
        fiber.cancelled = True
        self.cancelled.set()


class PlayedStage:
    """Each step of its denoising tells progress, a checkpoint and a preview."""

    def __init__(self, hold: bool = False, error: Exception | None = None) -> None:
        self.engine = PlayedEngine()
        self.hold = hold
        self.error = error
        self.is_held = threading.Event()

    def denoise(self, request: Any, conditioning: Any, checkpoint: Any, envelope: Any, follower: Any) -> Any:
        run = SimpleNamespace(fiber=Fiber("r", seconds=0.5), session=SimpleNamespace(steps_done=STEPS, resumed_at=1))
        run.warnings = ()
        follower.started(run)
        for step in range(1, STEPS + 1):
            if self.hold and step == 2:
                self.is_held.set()
                assert self.engine.cancelled.wait(PATIENCE_S)
            if run.fiber.cancelled:
                raise CancelledStage
            follower.progress(DenoisingProgress(step, STEPS))
            follower.checkpoint(Checkpoint("r", step, "fingerprint", "digest", EMPTY))
            follower.preview(step, DecodeInputs("decoder_calls", EMPTY))
        if self.error is not None:
            raise self.error
        return DecodeInputs("result", EMPTY), run


@pytest.fixture
def threads() -> Iterator[PlayedThreads]:
    made = PlayedThreads()
    yield made
    made.request_threads.shutdown()


def stream(threads: Any, stage: Any, envelope: Envelope = Envelope()) -> Any:  # noqa: B008  (it is frozen)
    return denoising_stream(threads, stage, REQUEST, envelope, Conditioning(EMPTY))


async def read_into(items: list[Any], reading: Any) -> None:
    async for item in reading:
        items.append(item)


def kinds(items: list[Any]) -> list[str]:
    return [item.kind if isinstance(item, PayloadFollows) else type(item).__name__ for item in items]


ONE_STEP = ["checkpoint", "Checkpoint", "preview", "DecodeInputs"]


async def test_each_payload_follows_its_announcement_and_the_decode_inputs_come_last(threads: PlayedThreads) -> None:
    items = [item async for item in stream(threads, PlayedStage())]
    assert kinds(items) == ["DenoisingBegun", *ONE_STEP * STEPS, "decode_inputs", "DecodeInputs"]
    assert [item.step for item in items if isinstance(item, PayloadFollows)] == [1, 1, 2, 2, 3, 3, STEPS]
    assert items[-2].seconds["denoiser_forwards"] == 0.5
    assert set(items[-2].seconds) == {"denoiser_queue", "denoise", "denoiser_forwards"}


async def test_progress_is_sent_only_where_it_is_asked_for(threads: PlayedThreads) -> None:
    items = [item async for item in stream(threads, PlayedStage(), Envelope(report_progress=True))]
    steps = ["DenoisingProgress", *ONE_STEP] * STEPS
    assert kinds(items) == ["DenoisingBegun", *steps, "decode_inputs", "DecodeInputs"]


async def test_every_step_is_traced_and_those_done_here_are_timed(threads: PlayedThreads) -> None:
    [_ async for _ in stream(threads, PlayedStage())]
    assert threads.traced_steps == STEPS
    assert (threads.steps, threads.bytes_out) == (STEPS - 1, 0)


async def test_an_error_comes_after_what_was_made_before_it(threads: PlayedThreads) -> None:
    items: list[Any] = []
    with pytest.raises(ValueError, match="nothing left"):
        await read_into(items, stream(threads, PlayedStage(error=ValueError("nothing left"))))
    assert kinds(items) == ["DenoisingBegun", *ONE_STEP * STEPS]


async def test_a_stream_that_nobody_reads_on_cancels_its_fiber(threads: PlayedThreads) -> None:
    stage = PlayedStage(hold=True)
    reading = stream(threads, stage)
    assert kinds([await anext(reading), await anext(reading)]) == ["DenoisingBegun", "checkpoint"]
    assert await asyncio.to_thread(stage.is_held.wait, PATIENCE_S)
    await reading.aclose()
    await asyncio.to_thread(threads.request_threads.shutdown)
    assert threads.outcome == "CancelledStage"


async def test_a_request_that_is_given_up_before_it_begins_is_cancelled_when_it_does(threads: PlayedThreads) -> None:
    busy = threading.Event()
    for _ in range(2):
        threads.request_threads.submit(busy.wait, PATIENCE_S)
    stage = PlayedStage(hold=True)
    reader = asyncio.create_task(anext(stream(threads, stage)))
    await asyncio.sleep(0.05)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    busy.set()
    await asyncio.to_thread(threads.request_threads.shutdown)
    assert threads.outcome in ("", "CancelledStage"), "it never ran, or left at its next forward"
    assert not stage.is_held.is_set()
