"""The step engine: one thread owns the device and runs the forwards of all fibers, merged where they fit.

Each fiber's work runs in that same thread, in a greenlet of its own: where it comes to a forward, it waits here and
the others go on. Whatever step a fiber is at, its forward can share a batch with any other of the same structure, so
fibers join and leave between any two forwards. A paused fiber is just one whose forward waits.

Greenlets and not threads: the work between two forwards is Python, of which one thread runs at a time whatever their
number, and eight threads that wake together after each batch fight for the interpreter for longer than their work
takes.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from deployments.engine.axes import BatchAxes
from deployments.engine.batches import Batches
from deployments.engine.executor import CacheContext, Executor, LocalExecutor
from deployments.engine.fiber import CancelledStage, Fiber
from deployments.engine.forward import Forward, Surround, bind
from deployments.engine.orders import ORDERS
from deployments.engine.statistics import BatchRun, Cancelled, EngineStatistics, Measure, ignore
from deployments.engine.step_costs import StepCosts
from deployments.engine.under_way import UnderWay
from deployments.errors import DeadlineExceededError, GenerationFailedError, TriptychError
from deployments.tensors.values import has_gradients

MAX_CALLS_ELSEWHERE = 64  # at a time; each is of one fiber
T = TypeVar("T")


class Engine:
    """Runs forwards until `close`. Threads hand it the work of their fibers with `call`; the work calls `run`."""

    def __init__(
        self,
        max_batch_size: int = 8,
        max_batch_tokens: int | None = None,
        max_wait_s: float = 0.01,
        order: str = "slack",
        executor: Executor | None = None,
        measure: Measure = ignore,
        compilation_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`compilation_s`: seconds that forwards have spent on being compiled so far, which are no measure of them."""
        self.max_wait_s = max_wait_s
        self.order = ORDERS[order]
        self.measure = measure
        self.compilation_s = compilation_s
        self.costs = StepCosts()
        self.statistics = EngineStatistics()
        self.under_way = UnderWay()  # in the engine's thread: a forward, or what fibers do between two of them
        self.batches = Batches(
            max_batch_size, max_batch_tokens, executor or LocalExecutor(), self.statistics, self.under_way
        )
        self._changed = threading.Condition()
        self._ready: deque[greenlet | Callable[[], None]] = deque()  # they go on before the next batch
        self._waiting: list[Forward] = []
        self._fibers: list[Fiber] = []  # that are under way
        self._calls: dict[Fiber, Future[Any]] = {}
        self._elsewhere = ThreadPoolExecutor(MAX_CALLS_ELSEWHERE, thread_name_prefix="elsewhere")
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # -- called by any thread ----------------------------------------------------------------------------------

    def begin(self, fiber: Fiber) -> None:
        with self._changed:
            self._fibers.append(fiber)

    def end(self, fiber: Fiber) -> None:
        with self._changed:
            self._fibers.remove(fiber)

    def call(self, fiber: Fiber, work: Callable[[], T]) -> T:
        """Runs a fiber's work in the engine's thread, by turns with that of others; returns or raises what it does.

        Raises CancelledStage, and GenerationFailedError when the engine is closed.
        """
        result: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise GenerationFailedError("the engine is closed")
            self._calls[fiber] = result
            self._soon(partial(fulfil, result, work))
        try:
            return result.result()
        except CancelledError:
            if result.cancelled():  # before it began; else the work's own
                raise CancelledStage from None
            raise
        finally:
            del self._calls[fiber], result  # an error holds this frame: with it, the tensors of its work would stay

    def cancel(self, fiber: Fiber) -> None:
        """Effective at once for a fiber that waits, else at its next forward."""
        with self._changed:
            if fiber.cancelled or fiber not in self._fibers:
                return
            fiber.cancelled = True
            self.statistics.cancelled += 1
            self.measure(Cancelled())
            result = self._calls.get(fiber)
            if result is not None and not result.cancel():  # it has begun
                for forward in [f for f in self._waiting if f.fiber is fiber]:
                    self._waiting.remove(forward)
                    forward.error = CancelledStage()
                    if not result.done():
                        result.set_exception(CancelledStage())
                    self._soon(forward.caller)  # to leave its work, when the thread is free

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
        """Fibers that wait for the thread."""
        return len(self._waiting) + len(self._ready)

    @property
    def num_fibers(self) -> int:
        return len(self._fibers)

    def describe(self) -> dict[str, Any]:
        """What waits and what has been done so far, as plain values."""
        statistics = {**vars(self.statistics), "batch_sizes": self.statistics.batch_sizes.copy()}
        return {"is_alive": self.is_alive, "waiting_forwards": self.num_waiting, **statistics}

    def set_axes(self, component: str, axes: BatchAxes) -> None:
        """What was learned of a module; what is known of it already stays."""
        self.batches.axes.setdefault(component, axes)

    def remaining_s(self) -> list[float]:
        """Device seconds that each fiber still needs, predicted from its own forwards; none before its first."""
        begun = [fiber for fiber in tuple(self._fibers) if fiber.forwards]
        return [fiber.seconds / fiber.forwards * fiber.remaining_forwards() for fiber in begun]

    def _soon(self, work: greenlet | Callable[[], None]) -> None:
        with self._changed:
            self._ready.append(work)
            self._changed.notify_all()

    # -- called by the work of fibers, in the engine's thread --------------------------------------------------

    def run(
        self,
        fiber: Fiber,
        module: Any,
        component: str,
        context: CacheContext | None,
        args: Any,
        kwargs: Any,
        surround: Surround | None = None,
        merge_key: Hashable | None = (),
        by_position: bool = False,
    ) -> Any:
        """The forward's output; other fibers go on until it is there.

        `surround` makes the context manager to be entered around the forward. Forwards of one `merge_key` may share
        a batch, which runs in the surrounding of its first; `by_position`: their samples lie in it as a pipeline's own
        do (Merger). None, or a surrounding without a key, or gradients that the pipeline asks for: this one runs alone.
        Raises what the module raised, CancelledStage, or DeadlineExceededError when the fiber has expired.
        """
        if threading.current_thread() is not self._thread:
            return self.call(
                fiber,
                lambda: self.run(fiber, module, component, context, args, kwargs, surround, merge_key, by_position),
            )
        arguments = bind(module, args, kwargs)
        forward = Forward(
            fiber, module, component, context, arguments, surround, merge_key, by_position, has_gradients(arguments)
        )
        self.batches.classify(forward)
        fiber.step_s = self.costs.predict(forward.structure, forward.num_samples) or fiber.step_s
        with self._changed:
            if self._closed:
                raise GenerationFailedError("the engine is closed")
            if fiber.cancelled:
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
        """Does what blocks, such as a call of another stage, in another thread; other fibers go on meanwhile."""
        caller, done = getcurrent(), self._elsewhere.submit(work)
        done.add_done_callback(lambda _: self._soon(caller))
        self._let_others_go_on()
        try:
            return done.result()
        finally:
            del done  # an error holds this frame, and would be held by it

    def _let_others_go_on(self) -> None:
        """Of a thread's settings, which greenlets share, each fiber keeps that of the gradients for itself.

        Nobody calls under autocast or in inference mode (no pipeline of diffusers does): those would be everybody's.
        """
        with_gradients = torch.is_grad_enabled()
        self._hub.switch()
        torch.set_grad_enabled(with_gradients)

    # -- the engine's thread ----------------------------------------------------------------------------------

    def _loop(self) -> None:
        self._hub = getcurrent()
        try:
            # C code calls `switch`, always at this depth of the C stack. With each error that torch makes it walks that
            # stack, from the fiber's frames into those below, which must lie where they lay when the fiber began:
            # called from different places, the first error in a fiber's own code would crash the process.
            deque(map(greenlet.switch, self._turns()), maxlen=0)
        finally:
            with self._changed:
                self._closed = True
                self._waiting, self._ready = [], deque()
                for result in list(self._calls.values()):  # nobody may wait for ever
                    if not result.done():
                        result.set_exception(GenerationFailedError("the engine is closed"))

    def _turns(self) -> Iterator[greenlet]:
        """The fibers that can go on, each until its next forward; the forwards run between the turns."""
        while not self._closed:
            yield from self._timed(self._ready_fibers())
            now = time.monotonic()
            late = self._refused(now, DeadlineExceededError, "the deadline that deadline_s set has passed")
            yield from self._timed(late)
            yield from self._timed(self._served(now))
        while self._ready or self._waiting:  # each to the end of its work
            yield from self._timed(self._ready_fibers())
            yield from self._timed(self._refused(math.inf, GenerationFailedError, "the engine is closed"))

    def _timed(self, turns: Iterator[greenlet]) -> Iterator[greenlet]:
        for turn in turns:
            with self.under_way.work("a turn", is_regular=False):
                yield turn

    def _ready_fibers(self) -> Iterator[greenlet]:
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

    def _refused(self, now: float, error: type[TriptychError], reason: str) -> Iterator[greenlet]:
        with self._changed:
            refused = [f for f in self._waiting if f.fiber.expires <= now]
            self._waiting = [f for f in self._waiting if f.fiber.expires > now]
        for forward in refused:
            forward.error = error(reason)
            yield forward.caller

    def _served(self, now: float) -> Iterator[greenlet]:
        batch = self._next_batch(now)
        if batch:
            run = self._run_batch(batch)
            for forward in batch:
                yield forward.caller
            self.measure(run)

    def _next_batch(self, now: float) -> list[Forward]:
        with self._changed:
            ranked = sorted(self._waiting, key=lambda f: self.order(f.fiber, now))
            batch = self.batches.fill(ranked) if ranked else []
            for forward in batch:
                self._waiting.remove(forward)
            return batch

    @torch.no_grad()
    def _run_batch(self, batch: list[Forward]) -> BatchRun:
        structure = batch[0].structure
        is_first_merge = len(batch) > 1 and not self.batches.is_known(structure)
        started, compiled_s = time.monotonic(), self.compilation_s()
        self.batches.run(batch)
        seconds = time.monotonic() - started - (self.compilation_s() - compiled_s)
        samples = sum(f.num_samples for f in batch)
        failed = sum(f.error is not None for f in batch)
        if not structure.is_alone and not is_first_merge and not failed:
            self.costs.record(structure, samples, seconds)
        is_merged = len(batch) > 1 and self.batches.may_share(batch[0])
        self._count(batch, is_merged)
        self.statistics.seconds += seconds
        for forward in batch:
            fiber = forward.fiber
            fiber.forwards += 1
            fiber.merged_forwards += is_merged
            fiber.seconds += seconds * forward.num_samples / samples
            fiber.step_s = self.costs.predict(forward.structure, forward.num_samples) or fiber.seconds / fiber.forwards
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
    """The body of a fiber's greenlet; `result` may have been cancelled before or while it waited."""
    if not result.set_running_or_notify_cancel():
        return
    torch.set_grad_enabled(True)  # as in a thread of its own
    try:
        value = work()
        if not result.done():
            result.set_result(value)
    except BaseException as error:  # noqa: BLE001  (raised in the thread that waits)
        if not result.done():
            result.set_exception(error)
        del result  # the error holds this frame
