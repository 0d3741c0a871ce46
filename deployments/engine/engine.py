"""The step engine: one thread owns the device and runs the forwards of all fibers, merged where they fit.

Each fiber's work runs in that same thread, in a greenlet of its own: where it comes to a forward, it waits here and
the others go on. Whatever step a fiber is at, its forward can share a batch with any other of the same structure, so
fibers join and leave between any two forwards. A paused fiber is just one whose forward waits.

The host runs ahead of an accelerator: a fiber goes on as soon as its forward was given to the device, and the next
batch is decided shortly before the device is done with the last one. What a forward costs, and that it failed, is seen
when its turn of the device is settled, at most two turns later.

Greenlets and not threads: the work between two forwards is Python, of which one thread runs at a time whatever their
number, and eight threads that wake together after each batch fight for the interpreter for longer than their work
takes.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.batches import Batches
from deployments.engine.batching.joining import GuidancePasses, Merging
from deployments.engine.clock import Clock, HostClock
from deployments.engine.executor import CacheContext, Executor, LocalExecutor
from deployments.engine.fiber import CancelledStage, Fiber
from deployments.engine.forward import Forward, PerSample, Surround, bind
from deployments.engine.marks import HostMark
from deployments.engine.orders import ORDERS
from deployments.engine.statistics import BatchRun, Cancelled, EngineStatistics, Measure, ignore
from deployments.engine.turns import IN_FLIGHT, Turn, passes_together, turn_of
from deployments.engine.under_way import UnderWay
from deployments.errors import DeadlineExceededError, GenerationFailedError, ReplicaUnfitError, TriptychError
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
        merging: Merging = "auto",
        guidance_passes: GuidancePasses = "apart",
        clock: Clock | None = None,
        compilation_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`compilation_s`: seconds that forwards have spent on being compiled so far, which are no measure of them."""
        self.max_wait_s = max_wait_s
        self.order = ORDERS[order]
        self.measure = measure
        self.clock = clock or HostClock()
        self.compilation_s = compilation_s
        self.executor = executor or LocalExecutor()
        self.statistics = EngineStatistics()
        self.under_way = UnderWay()  # in the engine's thread: a forward, or what fibers do between two of them
        self.batches = Batches(
            max_batch_size,
            max_batch_tokens,
            self.executor,
            self.statistics,
            self.under_way,
            merging,
            guidance_passes,
            compilation_s,
            measure,
        )
        self.costs = self.batches.costs
        self._changed = threading.Condition()
        self._ready: deque[greenlet | Callable[[], None]] = deque()  # they go on before the next batch
        self._waiting: list[Forward] = []
        self._held: list[Forward] = []  # asked for, and not to be made before their fiber waits for them
        self._fibers: list[Fiber] = []  # that are under way
        self._in_flight: deque[Turn] = deque()  # turns that the device has, the oldest first
        self._last: dict[Fiber, Turn] = {}  # of each fiber the newest turn, until it is settled
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
        """What it has asked for and not waited for is made for nobody."""
        with self._changed:
            self._fibers.remove(fiber)
            self._waiting = [forward for forward in self._waiting if forward.fiber is not fiber]
            self._held = [forward for forward in self._held if forward.fiber is not fiber]

    @contextmanager
    def merging_always(self) -> Iterator[None]:
        """Forwards share batches wherever that is right: afterwards it is known what batches cost."""
        joining = self.batches.joining
        before, joining.always = joining.always, True
        try:
            yield
        finally:
            joining.always = before

    def call(self, fiber: Fiber, work: Callable[[], T]) -> T:
        """Runs a fiber's work in the engine's thread, by turns with that of others; returns or raises what it does.

        Returns when the device has done the fiber's forwards. Raises CancelledStage, GenerationFailedError when the
        engine is closed, and ReplicaUnfitError where a forward failed after the fiber had gone on.
        """
        result = self.submit(fiber, work)
        try:
            value = result.result()
        except CancelledError:
            if result.cancelled():  # before it began; else the work's own
                raise CancelledStage from None
            raise
        finally:
            del result  # an error holds this frame: with it, the tensors of its work would stay
        turn = self._last.get(fiber)
        if turn is not None:
            self._settle(turn)
        if fiber.failed is not None:
            raise fiber.failed
        return value

    def submit(self, fiber: Fiber, work: Callable[[], T]) -> Future[T]:
        """The same without waiting for it."""
        result: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise GenerationFailedError("the engine is closed")
            self._calls[fiber] = result
            self._soon(partial(fulfil, result, work))
        result.add_done_callback(partial(self._forget_call, fiber))
        return result

    def _forget_call(self, fiber: Fiber, result: Future[Any]) -> None:
        with self._changed:
            if self._calls.get(fiber) is result:
                del self._calls[fiber]

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
                for forward in self._taken_of({fiber}):
                    if forward.is_awaited and not result.done():
                        result.set_exception(CancelledStage())
                    self._end_soon(forward, CancelledStage())  # to leave its work, when the thread is free

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
    def is_here(self) -> bool:
        """Whether this is the engine's thread."""
        return threading.current_thread() is self._thread

    @property
    def num_waiting(self) -> int:
        """Fibers that wait for the thread, each counted once however many forwards it waits for."""
        with self._changed:
            return len({forward.fiber for forward in self._waiting}) + len(self._ready)

    @property
    def num_fibers(self) -> int:
        return len(self._fibers)

    def describe(self) -> dict[str, Any]:
        """What waits and what has been done so far, as plain values."""
        statistics = {**vars(self.statistics), "batch_sizes": self.statistics.batch_sizes.copy()}
        waiting = {"waiting_fibers": self.num_waiting, "waiting_forwards": len(self._waiting)}
        return {"is_alive": self.is_alive, **waiting, **statistics}

    def set_axes(self, component: str, axes: BatchAxes) -> None:
        """What was learned of a module; what is known of an argument already stays."""
        known = self.batches.axes.get(component, BatchAxes({}, {}))
        self.batches.axes[component] = BatchAxes(axes.arguments | known.arguments, axes.outputs | known.outputs)

    def remaining_s(self) -> list[float]:
        """Device seconds that each fiber still needs, predicted from its own forwards; none before its first."""
        begun = [fiber for fiber in tuple(self._fibers) if fiber.timed_forwards]
        return [fiber.seconds / fiber.timed_forwards * fiber.remaining_forwards() for fiber in begun]

    def _taken_of(self, fibers: Collection[Fiber]) -> list[Forward]:
        """What these have asked for and nobody has made, which is then to be ended; called with `_changed`."""
        taken = [forward for forward in (*self._held, *self._waiting) if forward.fiber in fibers]
        self._held = [forward for forward in self._held if forward.fiber not in fibers]
        self._waiting = [forward for forward in self._waiting if forward.fiber not in fibers]
        return taken

    def _end_soon(self, forward: Forward, error: BaseException) -> None:
        forward.error, forward.is_done = error, True
        if forward.is_awaited:
            self._soon(forward.caller)

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
        per_sample: PerSample | None = None,
    ) -> Any:
        """The forward's output; other fibers go on until it is there.

        `surround` makes the context manager to be entered around the forward. Forwards of one `merge_key` may share
        a batch, which runs in the surrounding of its first; `by_position`: their samples lie in it as a pipeline's own
        do (Merger). None, or a surrounding without a key, or gradients that the pipeline asks for: this one runs alone.
        `per_sample` is entered inside of it, once for the samples of all forwards of a batch, and separates none.
        Raises what the module raised, CancelledStage, DeadlineExceededError when the fiber has expired, or
        ReplicaUnfitError where an earlier forward of the fiber failed after it had gone on.
        """
        settings = surround, merge_key, by_position, per_sample
        if not self.is_here:
            return self.call(fiber, lambda: self.run(fiber, module, component, context, args, kwargs, *settings))
        return self.wait(self.ask(fiber, module, component, context, args, kwargs, *settings))

    def ask(
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
        per_sample: PerSample | None = None,
    ) -> Forward:
        """The forward of `run`, which is held until its fiber waits for it; the fiber goes on.

        What a fiber has asked for may share a batch with what it asks for next, however long that takes. It has to
        `wait` for the output, or to `make` it; what is held of a fiber that ends is made for nobody.
        Raises CancelledStage or ReplicaUnfitError as `run` does.
        """
        arguments = bind(module, args, kwargs)
        forward = Forward(
            fiber,
            module,
            component,
            context,
            arguments,
            surround,
            merge_key,
            by_position,
            has_gradients(arguments),
            per_sample,
        )
        forward.arrived = self.clock.now()
        self.batches.classify(forward)
        with self._changed:
            if self._closed:
                raise GenerationFailedError("the engine is closed")
            if fiber.cancelled:
                raise CancelledStage
            if fiber.failed is not None:
                raise fiber.failed
            self._held.append(forward)
        return forward

    def wait(self, forward: Forward, still_held: Collection[Forward] = ()) -> Any:
        """Its output; other fibers go on until it is there. Raises what `run` does.

        What else the fiber has asked for may be made by then too, in the same batch or before it, but for `still_held`.
        """
        with self._changed:  # who ends it meanwhile, from another thread, must see that somebody waits, or be seen
            held = [each for each in self._held if each.fiber is not forward.fiber or each in still_held]
            self._waiting += [each for each in self._held if each not in held]
            self._held = held
            forward.is_awaited = not forward.is_done
        if forward.is_awaited:
            self._let_others_go_on()
        return output_of(forward)

    def make(self, forward: Forward) -> Any:
        """Its output, made alone and at once, within the turn of its fiber: for code that cannot let others go on.

        Raises what `run` does.
        """
        with self._changed:
            is_done = forward.is_done
            if not is_done:
                (self._held if forward in self._held else self._waiting).remove(forward)
        if not is_done:
            in_flight = tuple(self._in_flight)
            for turn in in_flight[: len(in_flight) - IN_FLIGHT + 1]:
                self._settle(turn)
            if forward.fiber.failed is not None:
                raise forward.fiber.failed
            self._launch([forward])
        return output_of(forward)

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
                self._waiting, self._held, self._ready = [], [], deque()
                for result in list(self._calls.values()):  # nobody may wait for ever
                    if not result.done():
                        result.set_exception(GenerationFailedError("the engine is closed"))

    def _turns(self) -> Iterator[greenlet]:
        """The fibers that can go on, each until its next forward; the forwards run between the turns."""
        while not self._closed:
            yield from self._timed(self._ready_fibers())
            now = self.clock.now()
            late = self._refused(now, DeadlineExceededError, "the deadline that deadline_s set has passed")
            yield from self._timed(late)
            yield from self._timed(self._served())
        while self._ready or self._waiting:  # each to the end of its work
            yield from self._timed(self._ready_fibers())
            yield from self._timed(self._refused(math.inf, GenerationFailedError, "the engine is closed"))
        for turn in tuple(self._in_flight):
            self._settle(turn)

    def _timed(self, turns: Iterator[greenlet]) -> Iterator[greenlet]:
        for turn in turns:
            with self.under_way.work("a turn", is_regular=False):
                yield turn

    def _ready_fibers(self) -> Iterator[greenlet]:
        """Waits for something to do.

        Those that come while others take their turns are among them for max_wait_s: they may share the next batch.
        """
        with self._changed:
            while not (self._ready or self._closed):
                seconds = self._rest_s()
                if seconds is not None and seconds <= 0:
                    break
                self.clock.wait(self._changed, seconds)
        until = self.clock.now() + self.max_wait_s
        while self._ready:
            ready = self._ready.popleft()
            yield ready if isinstance(ready, greenlet) else greenlet(ready)
            if self._waiting and self.clock.now() >= until:
                return

    def _rest_s(self) -> float | None:
        """Seconds until there is something to do but for fibers that are ready; None: until somebody comes.

        While the device is busy others may come, and a forward that waits may yet be passed or joined by theirs.
        """
        in_flight = tuple(self._in_flight)
        if not in_flight:
            return 0.0 if self._waiting else None
        newest = in_flight[-1]
        return (newest.is_due if self._waiting else newest.ends) - self.clock.now()

    def _refused(self, now: float, error: type[TriptychError], reason: str) -> Iterator[greenlet]:
        with self._changed:
            refused = [f for f in self._waiting if f.fiber.expires <= now]
            self._waiting = [f for f in self._waiting if f.fiber.expires > now]
        for forward in refused:
            forward.error, forward.is_done = error(reason), True
        yield from awaiting(refused)

    def _served(self) -> Iterator[greenlet]:
        """Gives the device its next batch when it is time; the fibers go on, though their numbers come later."""
        for turn in tuple(self._in_flight):
            if turn.ended.is_reached():
                self._settle(turn)
        seconds = self._rest_s()
        if seconds is None or seconds > 0:
            return
        in_flight = tuple(self._in_flight)
        for turn in in_flight[: len(in_flight) - IN_FLIGHT + 1] if self._waiting else in_flight:
            self._settle(turn)
        batch = self._next_batch(self.clock.now())
        if batch:
            self._launch(batch)
            yield from awaiting(batch)

    def _next_batch(self, now: float) -> list[Forward]:
        with self._changed:
            for forward in self._waiting:
                predicted = self.costs.predict(forward.structure, forward.num_samples)
                forward.fiber.step_s = predicted or forward.fiber.step_s
            ranked = sorted(self._waiting, key=lambda f: (self.order(f.fiber, now), f.fiber.arrived, f.fiber.number))
            batch = self.batches.fill(ranked, now) if ranked else []
            for forward in batch:
                self._waiting.remove(forward)
            return batch

    @torch.no_grad()
    def _launch(self, batch: list[Forward]) -> None:
        first, samples = batch[0], sum(f.num_samples for f in batch)
        is_trial = len(batch) > 1 and not self.batches.is_verified(batch)
        started, compiled_s = self.clock.now(), self.compilation_s()
        try:
            begun = self.executor.mark()
            self.batches.run(batch)
            ended = self.executor.mark()
        except Exception as error:  # noqa: BLE001  (of a device that takes no more marks)
            begun = ended = HostMark(self.clock.now)
            for forward in batch:
                forward.error = forward.error or error
        compiled_s = self.compilation_s() - compiled_s
        for forward in batch:
            forward.is_done = True
        failed = any(f.error is not None for f in batch)
        is_merged = len(batch) > 1 and self.batches.is_verified(batch) and self.batches.may_share(first)
        turn = turn_of(
            batch,
            begun,
            ended,
            started,
            max((each.ends for each in tuple(self._in_flight)), default=started),
            self.costs.at_least(first.structure, samples),
            is_merged,
            teaches_costs=not (first.structure.is_alone or is_trial or failed or compiled_s),
            compiled_s=compiled_s,
        )
        self._count(batch, is_merged)
        with self._changed:
            self._in_flight.append(turn)
            for forward in batch:
                forward.fiber.forwards += 1
                forward.fiber.merged_forwards += is_merged
                forward.fiber.passes_together += is_merged and sum(f.fiber is forward.fiber for f in batch) > 1
                note_batch(forward.fiber, batch if is_merged else [forward])
                self._last[forward.fiber] = turn
        if failed:  # the device may have raised it of a turn before
            for each in tuple(self._in_flight):
                self._settle(each)
        elif ended.is_reached():
            self._settle(turn)

    def _count(self, batch: list[Forward], is_merged: bool) -> None:
        statistics, size = self.statistics, len(batch)
        statistics.batches += 1
        statistics.forwards += size
        statistics.merged += size if is_merged else 0
        statistics.passes_together += passes_together(batch) if is_merged else 0
        statistics.batch_sizes[size] = statistics.batch_sizes.get(size, 0) + 1

    # -- called by any thread: what the device has done ---------------------------------------------------------

    def _settle(self, turn: Turn) -> None:
        """Waits for the device, and notes what the turn has cost or that it failed; of no effect a second time."""
        is_engine, was_reached = self.is_here, turn.ended.is_reached()
        error, seconds = None, 0.0
        with self.under_way.work(turn.kind) if is_engine and not was_reached else nullcontext():
            try:
                turn.ended.wait()
                seconds = max(0.0, turn.ended.seconds_since(turn.begun) - turn.compiled_s)
            except Exception as raised:  # noqa: BLE001  (of the device, in work that was given to it before)
                error = raised
        with self._changed:
            if turn.is_settled:
                return
            turn.is_settled = True
            self._in_flight.remove(turn)
            if self._in_flight and not was_reached:  # the next one has only begun
                self._in_flight[0].ends = self.clock.now() + self._in_flight[0].expected_s
            if error is not None:
                self._fail(turn, error)
            self._note(turn, seconds)
            for fiber, _ in turn.fibers:
                if self._last.get(fiber) is turn:
                    del self._last[fiber]
        num_failed = len(turn.fibers) if error else turn.num_failed
        self.measure(
            BatchRun(
                turn.component,
                turn.structure.shape,
                len(turn.fibers),
                turn.num_samples,
                seconds,
                turn.queue_seconds,
                turn.is_merged,
                num_failed,
                turn.num_passes_together,
            )
        )

    def _note(self, turn: Turn, seconds: float) -> None:
        if turn.teaches_costs and seconds:
            self.costs.record(turn.structure, turn.num_samples, seconds)
            if len(turn.fibers) == 1 and not self.batches.is_known(turn.structure):
                self.batches.joining.note_alone(turn.structure, seconds)
        self.statistics.seconds += seconds
        for fiber, samples in turn.fibers:
            fiber.timed_forwards += 1
            fiber.seconds += seconds * samples / turn.num_samples
            fiber.step_s = self.costs.predict(turn.structure, samples) or fiber.seconds / fiber.timed_forwards

    def _fail(self, turn: Turn, error: Exception) -> None:
        """Its fibers have gone on with numbers that never came: all they can do is to go on from a checkpoint."""
        self.batches.failed_late(turn.structure, turn.kind, turn.num_samples, error)
        fibers = [fiber for fiber, _ in turn.fibers]
        for fiber in fibers:
            if fiber.failed is None:
                fiber.failed = ReplicaUnfitError(f"the device failed in a forward that was given to it before: {error}")
                fiber.failed.__cause__ = error
        for forward in self._taken_of(fibers):
            assert forward.fiber.failed is not None
            self._end_soon(forward, forward.fiber.failed)


def awaiting(forwards: list[Forward]) -> Iterator[greenlet]:
    """The fibers that wait for one of these, which are done."""
    for forward in forwards:
        if forward.is_awaited:
            yield forward.caller


def output_of(forward: Forward) -> Any:
    """Raises the forward's error, which it lets go of: an error holds the frames that hold the forward."""
    error, forward.error = forward.error, None
    try:
        if error is not None:
            raise error
        return forward.output
    finally:
        del error


def note_batch(fiber: Fiber, batch: list[Forward]) -> None:
    """One of its forwards was in it."""
    fiber.batched_forwards += len(batch)
    fiber.largest_batch = max(fiber.largest_batch, len(batch))
    if len(batch) > 1:
        fiber.mates.update(each.fiber.number for each in batch if each.fiber is not fiber)


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
