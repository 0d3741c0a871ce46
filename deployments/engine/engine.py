"""The step engine: one thread owns the device and runs the forwards of all requests, merged where they fit.

Each request runs its pipeline's own `__call__` in that same thread, in a greenlet of its own: where it comes to
a forward of a denoiser, it waits here and the others go on. Whatever step a request is at, its forward can share
a batch with any other of the same structure, so requests join and leave between any two steps. A paused request
is just one whose forward waits.

Greenlets and not threads: pipeline code is Python, of which one thread runs at a time whatever their number, and
eight threads that wake together after each batch fight for the interpreter for longer than their work takes.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from deployments.denoising.probe import bind
from deployments.engine.batches import Batches
from deployments.engine.forward import Forward, Job
from deployments.engine.measurements import BatchRun, Cancelled, EngineStatistics, Measure, ignore
from deployments.engine.step_costs import StepCosts
from deployments.errors import GenerationFailedError
from deployments.stage_pipeline.sessions.session import CancelledStage

MAX_CALLS_ELSEWHERE = 64  # at a time; each is of one request
T = TypeVar("T")
Order = Callable[[Job, float], float]


def first_come(job: Job, now: float) -> float:
    """First come, first served."""
    return job.arrived


def smallest_slack(job: Job, now: float) -> float:
    """Seconds to the deadline beyond what the request still needs; a waiting request's slack only shrinks.

    A request without a deadline goes first: its deadline is set when its first forward has been measured. One that is
    late counts by how much in its own durations: else a long one, late by seconds on a machine that has become slow,
    would hold up every short one for as many seconds.
    """
    if job.deadline is None:
        return -math.inf
    remaining = job.remaining_forwards()
    slack = job.deadline - now - job.step_s * remaining
    return slack if slack >= 0 else slack / max(job.step_s * (job.forwards + remaining), 1e-9)


ORDERS: dict[str, Order] = {"slack": smallest_slack, "fifo": first_come}


class Engine:
    """Runs forwards until `close`. Requests' threads hand it their work with `call`; the work calls `run`."""

    def __init__(
        self,
        max_batch_size: int = 8,
        max_batch_tokens: int | None = None,
        max_wait_s: float = 0.01,
        order: str = "slack",
        synchronize: Callable[[], None] = lambda: None,
        measure: Measure = ignore,
    ) -> None:
        self.max_wait_s = max_wait_s
        self.order = ORDERS[order]
        self.measure = measure
        self.costs = StepCosts()
        self.statistics = EngineStatistics()
        self.batches = Batches(max_batch_size, max_batch_tokens, synchronize, self.statistics)
        self._changed = threading.Condition()
        self._ready: deque[greenlet | Callable[[], None]] = deque()  # requests that go on before the next batch
        self._waiting: list[Forward] = []
        self._jobs: list[Job] = []  # of requests that are under way
        self._calls: dict[Job, Future[Any]] = {}
        self._elsewhere = ThreadPoolExecutor(MAX_CALLS_ELSEWHERE, thread_name_prefix="elsewhere")
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # -- called by the threads of requests ----------------------------------------------------------------

    def begin(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)

    def end(self, job: Job) -> None:
        with self._changed:
            self._jobs.remove(job)

    def call(self, job: Job, work: Callable[[], T]) -> T:
        """Runs a request's work in the engine's thread, by turns with that of others; returns or raises what it does.

        Raises CancelledStage, and GenerationFailedError when the engine is closed.
        """
        result: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise GenerationFailedError("the engine is closed")
            self._calls[job] = result
            self._soon(partial(fulfil, result, work))
        try:
            return result.result()
        except CancelledError:
            if result.cancelled():  # before it began; else the work's own
                raise CancelledStage from None
            raise
        finally:
            del self._calls[job], result  # an error holds this frame: with it, its request's tensors would stay

    def cancel(self, job: Job) -> None:
        """Effective at once for a request that waits, else at its next forward."""
        with self._changed:
            if job.cancelled or job not in self._jobs:
                return
            job.cancelled = True
            self.statistics.cancelled += 1
            self.measure(Cancelled())
            result = self._calls.get(job)
            if result is not None and not result.cancel():  # it has begun
                for forward in [f for f in self._waiting if f.job is job]:
                    self._waiting.remove(forward)
                    forward.error = CancelledStage()
                    if not result.done():
                        result.set_exception(CancelledStage())
                    self._soon(forward.request)  # to leave its work, when the thread is free

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(10)
        self._elsewhere.shutdown(wait=False)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the thread."""
        return len(self._waiting) + len(self._ready)

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def remaining_s(self) -> list[float]:
        """Device seconds that each request still needs, predicted from its own forwards; none before its first."""
        jobs = [job for job in tuple(self._jobs) if job.forwards]
        return [job.seconds / job.forwards * job.remaining_forwards() for job in jobs]

    def _soon(self, request: greenlet | Callable[[], None]) -> None:
        with self._changed:
            self._ready.append(request)
            self._changed.notify_all()

    # -- called by the requests' work, in the engine's thread ------------------------------------------------

    def run(
        self,
        job: Job,
        module: Any,
        component: str,
        context: tuple[Any, dict[str, Any]] | None,
        args: Any,
        kwargs: Any,
        caches: AbstractContextManager[None] | None = None,
    ) -> Any:
        """The forward's output; other requests go on until it is there.

        Raises what it raised, CancelledStage, or GenerationFailedError when the request's deadline has passed.
        """
        if threading.current_thread() is not self._thread:
            return self.call(job, lambda: self.run(job, module, component, context, args, kwargs, caches))
        forward = Forward(job, module, component, context, bind(module, args, kwargs), caches)
        self.batches.classify(forward)
        job.step_s = self.costs.predict(forward.structure, forward.num_samples) or job.step_s
        with self._changed:
            if self._closed:
                raise GenerationFailedError("the engine is closed")
            if job.cancelled:
                raise CancelledStage
            self._waiting.append(forward)
        self._let_others_go_on()
        error, output = forward.error, forward.output
        del forward  # an error holds this frame, and would be held by it
        try:
            if error is not None:
                raise error
            return output
        finally:
            del error

    def elsewhere(self, work: Callable[[], T]) -> T:
        """Does what blocks, such as a call of another stage, in another thread; other requests go on meanwhile."""
        request, done = getcurrent(), self._elsewhere.submit(work)
        done.add_done_callback(lambda _: self._soon(request))
        self._let_others_go_on()
        try:
            return done.result()
        finally:
            del done  # an error holds this frame, and would be held by it

    def _let_others_go_on(self) -> None:
        """Of a thread's settings, which greenlets share, each request keeps that of the gradients for itself.

        No pipeline of diffusers calls its denoiser under autocast or in inference mode: those would be everybody's.
        """
        with_gradients = torch.is_grad_enabled()
        self._hub.switch()
        torch.set_grad_enabled(with_gradients)

    # -- the engine's thread ----------------------------------------------------------------------------------

    def _loop(self) -> None:
        self._hub = getcurrent()
        try:
            # C code calls `switch`, always at this depth of the C stack. With each error that torch makes it walks that
            # stack, from the request's frames into those below, which must lie where they lay when the request began:
            # called from different places, the first error in a request's own code would crash the process.
            deque(map(greenlet.switch, self._turns()), maxlen=0)
        finally:
            with self._changed:
                self._closed = True
                self._waiting, self._ready = [], deque()
                for result in list(self._calls.values()):  # nobody may wait for ever
                    if not result.done():
                        result.set_exception(GenerationFailedError("the engine is closed"))

    def _turns(self) -> Iterator[greenlet]:
        """The requests that can go on, each until its next forward; the forwards run between the turns."""
        while not self._closed:
            yield from self._ready_requests()
            now = time.monotonic()
            yield from self._refused(now, "the request's deadline has passed")
            yield from self._served(now)
        while self._ready or self._waiting:  # each to the end of its work
            yield from self._ready_requests()
            yield from self._refused(math.inf, "the engine is closed")

    def _ready_requests(self) -> Iterator[greenlet]:
        """Waits for something to do.

        Those that come while others take their turns are among them for max_wait_s: they may share the next batch.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._waiting or self._closed)
        until = time.monotonic() + self.max_wait_s
        while self._ready:
            ready = self._ready.popleft()
            yield ready if isinstance(ready, greenlet) else greenlet(ready)
            if self._waiting and time.monotonic() >= until:
                return

    def _refused(self, now: float, reason: str) -> Iterator[greenlet]:
        with self._changed:
            refused = [f for f in self._waiting if f.job.expires <= now]
            self._waiting = [f for f in self._waiting if f.job.expires > now]
        for forward in refused:
            forward.error = GenerationFailedError(reason)
            yield forward.request

    def _served(self, now: float) -> Iterator[greenlet]:
        batch = self._next_batch(now)
        if batch:
            run = self._run_batch(batch)
            for forward in batch:
                yield forward.request
            self.measure(run)

    def _next_batch(self, now: float) -> list[Forward]:
        with self._changed:
            ranked = sorted(self._waiting, key=lambda f: self.order(f.job, now))
            batch = self.batches.fill(ranked) if ranked else []
            for forward in batch:
                self._waiting.remove(forward)
            return batch

    @torch.no_grad()
    def _run_batch(self, batch: list[Forward]) -> BatchRun:
        structure = batch[0].structure
        is_first_merge = len(batch) > 1 and not self.batches.is_known(structure)
        started = time.monotonic()
        self.batches.run(batch)
        seconds = time.monotonic() - started
        samples = sum(f.num_samples for f in batch)
        failed = sum(f.error is not None for f in batch)
        if not structure.is_alone and not is_first_merge and not failed:
            self.costs.record(structure, samples, seconds)
        is_merged = len(batch) > 1 and self.batches.may_share(batch[0])
        self._count(batch, is_merged)
        self.statistics.seconds += seconds
        for forward in batch:
            job = forward.job
            job.forwards += 1
            job.merged_forwards += is_merged
            job.seconds += seconds * forward.num_samples / samples
            job.step_s = self.costs.predict(forward.structure, forward.num_samples) or job.seconds / job.forwards
        return BatchRun(
            batch[0].component,
            structure.shape,
            len(batch),
            samples,
            seconds,
            tuple(started - f.arrived for f in batch),
            is_merged,
            failed,
        )

    def _count(self, batch: list[Forward], is_merged: bool) -> None:
        statistics, size = self.statistics, len(batch)
        statistics.batches += 1
        statistics.forwards += size
        statistics.merged += size if is_merged else 0
        statistics.batch_sizes[size] = statistics.batch_sizes.get(size, 0) + 1


def fulfil(result: Future[T], work: Callable[[], T]) -> None:
    """The body of a request's greenlet; `result` may have been cancelled before or while it waited."""
    if not result.set_running_or_notify_cancel():
        return
    torch.set_grad_enabled(True)  # as in a thread of its own
    try:
        value = work()
        if not result.done():
            result.set_result(value)
    except BaseException as error:  # noqa: BLE001  (raised in the thread of the request)
        if not result.done():
            result.set_exception(error)
        del result  # the error holds this frame
