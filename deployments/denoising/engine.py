"""The step engine: one thread owns the device and runs the forwards of all requests, merged where they fit.

Each request runs its pipeline's own `__call__` in that same thread, in a greenlet of its own: where it comes to
a forward of a denoiser, it waits here and the others go on. Whatever step a request is at, its forward can share
a batch with any other of the same structure, so requests join and leave between any two steps. A paused request
is just one whose forward waits.

Greenlets and not threads: pipeline code is Python, of which one thread runs at a time whatever their number, and
eight threads that wake together after each batch fight for the interpreter for longer than their work takes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from deployments.denoising.batching import BatchAxes, CannotMergeError, Merger, Path
from deployments.denoising.measurements import BatchRun, Cancelled, Measure, ignore
from deployments.denoising.probe import bind
from deployments.denoising.step_costs import StepCosts
from deployments.errors import GenerationFailedError
from deployments.stage_pipeline.denoise_session import call_directly
from deployments.stage_pipeline.session import CancelledStage
from deployments.values import tensors

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative to the largest value of the lone forward
HALF_TOLERANCE = 5e-2  # float16 and bfloat16
STRUCTURES_KEPT = 4096
MAX_CALLS_ELSEWHERE = 64  # at a time; each is of one request
T = TypeVar("T")


@dataclass(eq=False)
class Job:
    """One request as the engine knows it."""

    request_id: str
    deterministic: bool = False
    deadline: float | None = None  # time.monotonic() by which it should be done; None: not known yet
    arrived: float = field(default_factory=time.monotonic)
    remaining_forwards: Callable[[], int] = lambda: 1
    expires: float = math.inf  # time.monotonic() after which nobody wants it
    cancelled: bool = False
    forwards: int = 0
    merged_forwards: int = 0
    seconds: float = 0.0  # its share of the device's time
    step_s: float = 0.0  # seconds of its newest forward alone, as such forwards usually take


@dataclass(eq=False)
class Structure:
    """What forwards have in common that may share a batch; one object for each `key`, quick to compare."""

    key: Hashable  # the denoiser, its cache context, and of each argument what merging asks for
    shape: str  # for people
    is_alone: bool = False  # a forward that never shares

    def __str__(self) -> str:
        return str(self.key)


@dataclass(eq=False)
class Forward:
    """A forward that waits for the device."""

    job: Job
    module: Any
    component: str
    context: tuple[Any, dict[str, Any]] | None
    arguments: dict[str, Any]
    caches: AbstractContextManager[None] | None  # lends the request's cache contexts to the module
    structure: Structure = field(default_factory=lambda: Structure(None, ""))
    num_samples: int = 1
    merger: Merger | None = None
    arrived: float = field(default_factory=time.monotonic)
    request: greenlet = field(default_factory=getcurrent)  # goes on when the forward is done
    output: Any = None
    error: BaseException | None = None


@dataclass
class EngineStatistics:
    """What the engine has done; the replica's metrics read it."""

    forwards: int = 0  # of requests
    batches: int = 0  # of the device
    merged: int = 0  # forwards that shared a batch
    refused_structures: int = 0  # structures whose merge deviated and is never made again
    bisections: int = 0
    cancelled: int = 0
    seconds: float = 0.0  # of the device
    batch_sizes: dict[int, int] = field(default_factory=dict)


Order = Callable[[Job, float], float]


def first_come(job: Job, now: float) -> float:
    """First come, first served."""
    return job.arrived


def smallest_slack(job: Job, now: float) -> float:
    """Seconds to the deadline beyond what the request still needs; a waiting request's slack only shrinks.

    A request without a deadline goes first: its deadline is set when its first forward has been measured.
    """
    return -math.inf if job.deadline is None else job.deadline - now - job.step_s * job.remaining_forwards()


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
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_wait_s = max_wait_s
        self.order = ORDERS[order]
        self.synchronize = synchronize
        self.measure = measure
        self.axes: dict[str, BatchAxes] = {}
        self.costs = StepCosts()
        self.statistics = EngineStatistics()
        self._changed = threading.Condition()
        self._ready: deque[greenlet | Callable[[], None]] = deque()  # requests that go on before the next batch
        self._waiting: list[Forward] = []
        self._jobs: list[Job] = []  # of requests that are under way
        self._calls: dict[Job, Future[Any]] = {}
        self._elsewhere = ThreadPoolExecutor(MAX_CALLS_ELSEWHERE, thread_name_prefix="elsewhere")
        self._structures: dict[Hashable, Structure] = {}
        self._shares: dict[Structure, frozenset[Path] | None] = {}  # verified structures; None: never merge
        self._caps: dict[Structure, int] = {}  # samples that fit into memory, learned
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
        self._classify(forward)
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
            batch = self._fill_batch(ranked) if ranked else []
            for forward in batch:
                self._waiting.remove(forward)
            return batch

    def _may_share(self, forward: Forward) -> bool:
        alone = forward.job.deterministic or forward.structure.is_alone
        return not alone and self._shares.get(forward.structure, frozenset()) is not None

    def _fill_batch(self, ranked: list[Forward]) -> list[Forward]:
        first = ranked[0]
        cap = self._caps.get(first.structure, self.max_batch_size * first.num_samples)  # in samples
        if self.max_batch_tokens is not None:
            cap = min(cap, max(1, self.max_batch_tokens // max(1, tokens_per_sample(first))))
        batch, samples = [first], first.num_samples
        if not self._may_share(first):
            return batch
        for forward in ranked[1:]:
            fits = len(batch) < self.max_batch_size and samples + forward.num_samples <= max(cap, first.num_samples)
            if fits and forward.structure is first.structure and not forward.job.deterministic:
                batch.append(forward)
                samples += forward.num_samples
        return batch

    def _classify(self, forward: Forward) -> None:
        merger = Merger(self.axes.get(forward.component))
        forward.merger = merger
        forward.num_samples = merger.num_samples(forward.arguments)
        context = forward.context[0] if forward.context else None
        try:
            if forward.caches is not None:
                raise CannotMergeError("the request has cache contexts of its own")
            structure = merger.structure(forward.arguments, forward.num_samples)
            forward.structure = self._known((forward.component, context, merger.axes is None, structure), forward)
        except CannotMergeError:
            forward.structure = Structure(None, shape_of_sample(forward), is_alone=True)

    def _known(self, key: Hashable, forward: Forward) -> Structure:
        if key not in self._structures:
            if len(self._structures) >= STRUCTURES_KEPT:
                for known in (self._structures, self._shares, self._caps):
                    known.clear()
            self._structures[key] = Structure(key, shape_of_sample(forward))
        return self._structures[key]

    @torch.no_grad()
    def _run_batch(self, batch: list[Forward]) -> BatchRun:
        structure = batch[0].structure
        is_first_merge = len(batch) > 1 and structure not in self._shares
        started = time.monotonic()
        self._solve(batch)
        seconds = time.monotonic() - started
        samples = sum(f.num_samples for f in batch)
        failed = sum(f.error is not None for f in batch)
        if not structure.is_alone and not is_first_merge and not failed:
            self.costs.record(structure, samples, seconds)
        is_merged = len(batch) > 1 and self._may_share(batch[0])
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

    def _solve(self, batch: list[Forward]) -> None:
        """Fills in each forward's output or error; an error in a batch is narrowed down by halving it."""
        if len(batch) == 1:
            self._solve_alone(batch[0])
            return
        try:
            outputs = self._merged(batch)
        except Exception as error:  # noqa: BLE001  (whose fault it is shows when the halves run)
            self._learn_cap(batch, error)
            self.statistics.bisections += 1
            middle = len(batch) // 2
            self._solve(batch[:middle])
            self._solve(batch[middle:])
            return
        for forward, output in zip(batch, outputs, strict=True):
            forward.output = output

    def _solve_alone(self, forward: Forward) -> None:
        try:
            forward.output = self._call(forward, forward.arguments)
        except BaseException as error:  # noqa: BLE001  (raised in the code of the request)
            forward.error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # not this frame

    def _learn_cap(self, batch: list[Forward], error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._caps[batch[0].structure] = max(1, sum(f.num_samples for f in batch) // 2)
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()

    def _merged(self, batch: list[Forward]) -> list[Any]:
        structure, merger = batch[0].structure, batch[0].merger
        assert merger is not None
        if structure not in self._shares:
            return self._verified_merge(batch, merger)
        shared = self._shares[structure]
        if shared is None:
            return [self._call(f, f.arguments) for f in batch]
        try:
            return self._call_merged(batch, merger, shared)
        except CannotMergeError:  # an argument that was equal before differs this time
            return [self._call(f, f.arguments) for f in batch]

    def _verified_merge(self, batch: list[Forward], merger: Merger) -> list[Any]:
        """The first merge of a structure: lone forwards too, and what deviates from them is never merged."""
        alone = [self._call(f, f.arguments) for f in batch]
        for shared in merger.shared_guesses([f.arguments for f in batch]):
            try:
                merged = self._call_merged(batch, merger, shared)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001  (a wrong guess of the axes)
                logger.info("%s does not merge so: %s", batch[0].component, error)
                continue
            if all(is_close(m, a) for m, a in zip(merged, alone, strict=True)):
                self._shares[batch[0].structure] = shared
                return alone
        logger.warning("forwards of %s run alone: merged ones deviate", batch[0].component)
        self._shares[batch[0].structure] = None
        self.statistics.refused_structures += 1
        return alone

    def _call_merged(self, batch: list[Forward], merger: Merger, shared: frozenset[Path]) -> list[Any]:
        counts = [f.num_samples for f in batch]
        arguments = merger.merge([f.arguments for f in batch], counts, shared)
        return merger.split(self._call(batch[0], arguments), counts)

    def _call(self, forward: Forward, arguments: dict[str, Any]) -> Any:
        with forward.caches or nullcontext():
            output = call_directly(forward.module, forward.component, forward.context, (), arguments)
            self.synchronize()
        return output


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


def is_close(merged: Any, alone: Any) -> bool:
    """Whether a merged forward's output is the lone one's but for rounding."""
    for a, b in zip(tensors(merged), tensors(alone), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        tolerance = TOLERANCE.get(b.dtype, HALF_TOLERANCE)
        if not b.is_floating_point():
            return torch.equal(a, b)
        # What one request has made NaN of itself stays NaN; it may not spread to others.
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        a, b = (x.nan_to_num(0.0, 0.0, 0.0).float() for x in (a, b))
        if not bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)):
            return False
    return True


def tokens_per_sample(forward: Forward) -> int:
    """Positions of the noisy latents that one sample brings."""
    largest = largest_argument(forward)
    if largest is None:
        return 1
    return max(1, int(largest.numel()) // forward.num_samples // max(1, int(largest.shape[-1])))


def shape_of_sample(forward: Forward) -> str:
    """The largest argument without its first axis, for people: "1024x64"."""
    largest = largest_argument(forward)
    return "x".join(map(str, largest.shape[1:])) if largest is not None else ""


def largest_argument(forward: Forward) -> torch.Tensor | None:
    candidates: Iterable[Any] = tensors(forward.arguments)
    return max((t for t in candidates if t.is_floating_point() and t.ndim), key=torch.Tensor.numel, default=None)
