"""The threads of a replica, in which its stages work under the eyes of its observers; the event loop stays free."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from deployments.engine.under_way import UnderWay
from deployments.messages import Conditioning, DecodeInputs, Envelope, GenerationRequest, StageName
from deployments.observability.observer import Observers, StageWork
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.pipeline_code import PIPELINE_CODE
from deployments.stages.decode import Decoded

MAX_REQUEST_THREADS = 64  # each waits for the engine most of the time; Serve's max_ongoing_requests bounds them first

SIZES = ("width", "height", "num_frames")  # arguments by which the first of its kind is told

P = ParamSpec("P")
T = TypeVar("T")


class StageThreads:
    """One thread owns the pipelines and runs encoder and VAE; in the others denoisings wait for the engine.

    What several models share is so in the hands of one request at a time.
    """

    def __init__(self, observers: Observers) -> None:
        self._observers = observers
        self.under_way = UnderWay()  # in the thread that owns the pipelines
        self._worker_ident: int | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage")
        self.request_threads: Executor = ThreadPoolExecutor(
            max_workers=MAX_REQUEST_THREADS, thread_name_prefix="request"
        )

    async def run(
        self,
        pipeline: StagePipeline,
        stage: StageName,
        request: GenerationRequest,
        envelope: Envelope,
        run: Callable[..., T],
        *inputs: Any,
    ) -> T:
        """`run(pipeline, request, *inputs)` in the thread that owns the pipelines, observed."""
        work = stage_work(stage, request, envelope, time.time(), *inputs)
        kind = (stage, request.model, work.bytes_in, *(str(request.arguments.get(name)) for name in SIZES))

        def observed() -> T:
            with self._observers.around(work):
                output = run(pipeline, request, *inputs)
                work.bytes_out = num_bytes(output)
                return output

        with self._observers.present(work):  # it waits for its turn first
            return await self._in_worker(kind, observed)

    @contextmanager
    def observed_denoising(
        self, request: GenerationRequest, envelope: Envelope, arrived: float, conditioning: Conditioning
    ) -> Iterator[StageWork]:
        """Entered in the thread of the request; `arrived` is a time.time()."""
        work = stage_work("denoiser", request, envelope, arrived, conditioning)
        with self._observers.present(work), self._observers.around(work):
            yield work

    async def in_worker(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in the thread that owns the pipelines."""
        return await self._in_worker(function, lambda: function(*args, **kwargs), is_regular=False)

    def now_in_worker(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for a thread that waits, before any request is there."""
        return self._worker.submit(function, *args, **kwargs).result()

    def waited_until(self) -> float | None:
        """When that thread got the pipeline's code at last, by the clock; None while other threads have it."""
        return PIPELINE_CODE.waited_until(self._worker_ident)

    async def _in_worker(self, kind: Hashable, function: Callable[[], T], is_regular: bool = True) -> T:
        def timed() -> T:
            self._worker_ident = threading.get_ident()
            with self.under_way.work(kind, is_regular):
                return function()

        return await asyncio.get_running_loop().run_in_executor(self._worker, timed)

    def close(self) -> None:
        self._worker.shutdown()
        self.request_threads.shutdown()


def stage_work(
    stage: StageName, request: GenerationRequest, envelope: Envelope, arrived: float, *inputs: Any
) -> StageWork:
    """What observers are told of a request as it comes; `inputs` are the messages of the stages before."""
    sent = max((getattr(message, "made_at", 0.0) for message in inputs), default=0.0)
    return StageWork(stage, request, arrived, envelope, sent, bytes_in=sum(num_bytes(message) for message in inputs))


def num_bytes(message: Any) -> int:
    """Bytes of the numbers or files that a message carries."""
    if isinstance(message, Conditioning):
        return message.calls.num_bytes
    if isinstance(message, DecodeInputs):
        return message.content.num_bytes
    return message.num_bytes if isinstance(message, Decoded) else 0
