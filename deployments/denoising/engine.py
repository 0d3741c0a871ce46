"""The step engine: one thread owns the device and runs the forwards of all requests, merged where they fit.

Each request runs its pipeline's own `__call__` in a thread of its own. When that comes to a forward of a
denoiser, it waits here. Whatever step a request is at, its forward can share a batch with any other of the
same structure, so requests join and leave between any two steps. A paused request is just one whose
forward waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.denoising.batching import BatchAxes, CannotMergeError, Merger, Path
from deployments.denoising.probe import bind
from deployments.denoising.step_costs import StepCosts
from deployments.stage_pipeline.denoise_session import call_directly
from deployments.stage_pipeline.session import CancelledStage
from deployments.values import tensors

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative to the largest value of the lone forward
HALF_TOLERANCE = 5e-2  # float16 and bfloat16
MERGED_STRUCTURES_KEPT = 4096


@dataclass(eq=False)
class Job:
    """One request as the engine knows it."""

    request_id: str
    deterministic: bool = False
    deadline: float = float("inf")  # time.monotonic() by which it should be done
    arrived: float = field(default_factory=time.monotonic)
    remaining_forwards: Callable[[], int] = lambda: 1
    cancelled: bool = False
    forwards: int = 0
    merged_forwards: int = 0
    seconds: float = 0.0  # its share of the device's time


@dataclass(eq=False)
class Forward:
    """A forward that waits for the device."""

    job: Job
    module: Any
    component: str
    context: tuple[Any, dict[str, Any]] | None
    arguments: dict[str, Any]
    activate: Callable[[], None] | None  # puts the request's cache contexts into the module, or takes all out
    is_cached: bool
    structure: Hashable = None
    num_samples: int = 1
    merger: Merger | None = None
    done: threading.Event = field(default_factory=threading.Event)
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
    batch_sizes: dict[int, int] = field(default_factory=dict)


Order = Callable[[Forward, StepCosts, float], float]


def first_come(forward: Forward, costs: StepCosts, now: float) -> float:
    """First come, first served."""
    return forward.job.arrived


def smallest_slack(forward: Forward, costs: StepCosts, now: float) -> float:
    """Seconds to the deadline beyond what the request still needs; a waiting request's slack only shrinks."""
    step = costs.predict(forward.structure, forward.num_samples) or 0.0
    return forward.job.deadline - now - step * forward.job.remaining_forwards()


ORDERS: dict[str, Order] = {"slack": smallest_slack, "fifo": first_come}


class Engine:
    """Runs forwards until `close`; `run` is called by the requests' threads."""

    def __init__(
        self,
        max_batch_size: int = 8,
        max_batch_tokens: int | None = None,
        max_wait_s: float = 0.01,
        order: str = "slack",
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.max_wait_s = max_wait_s
        self.order = ORDERS[order]
        self.synchronize = synchronize
        self.axes: dict[str, BatchAxes] = {}
        self.costs = StepCosts()
        self.statistics = EngineStatistics()
        self._changed = threading.Condition()
        self._waiting: list[Forward] = []
        self._jobs: list[Job] = []  # of requests that are under way
        self._shares: dict[Hashable, frozenset[Path] | None] = {}  # verified structures; None: never merge
        self._caps: dict[Hashable, int] = {}  # samples that fit into memory, learned
        self._closed = False
        self.last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    # -- called by the threads of requests ----------------------------------------------------------------

    def begin(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)

    def end(self, job: Job) -> None:
        with self._changed:
            self._jobs.remove(job)
            self._changed.notify_all()

    def run(
        self,
        job: Job,
        module: Any,
        component: str,
        context: tuple[Any, dict[str, Any]] | None,
        args: Any,
        kwargs: Any,
        activate: Callable[[], None] | None = None,
        is_cached: bool = False,
    ) -> Any:
        """Waits for the forward's output; raises what it raised, or CancelledStage."""
        forward = Forward(job, module, component, context, bind(module, args, kwargs), activate, is_cached)
        self._classify(forward)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if job.cancelled:
                raise CancelledStage
            self._waiting.append(forward)
            self._changed.notify_all()
        forward.done.wait()
        if forward.error is not None:
            raise forward.error
        return forward.output

    def cancel(self, job: Job) -> None:
        """Effective at once for a waiting forward, else at the next."""
        with self._changed:
            if job.cancelled or job not in self._jobs:
                return
            job.cancelled = True
            self.statistics.cancelled += 1
            for forward in [f for f in self._waiting if f.job is job]:
                self._waiting.remove(forward)
                forward.error = CancelledStage()
                forward.done.set()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(10)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # -- the engine's thread ----------------------------------------------------------------------------------

    def _loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._run_batch(batch)
            self.last_progress = time.monotonic()

    def _next_batch(self) -> list[Forward] | None:
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return None
                self._changed.wait()
            self._wait_for_company()
            now = time.monotonic()
            ranked = sorted(self._waiting, key=lambda f: self.order(f, self.costs, now))
            if not ranked:
                return []
            batch = self._fill_batch(ranked)
            for forward in batch:
                self._waiting.remove(forward)
            return batch

    def _wait_for_company(self) -> None:
        """A moment for requests that are between two forwards; never longer than max_wait_s."""
        until = time.monotonic() + self.max_wait_s
        while self._waiting and len(self._waiting) < min(len(self._jobs), self.max_batch_size):
            left = until - time.monotonic()
            if left <= 0 or self._closed or all(f.job.deterministic for f in self._waiting):
                return
            self._changed.wait(left)

    def _fill_batch(self, ranked: list[Forward]) -> list[Forward]:
        first = ranked[0]
        cap = min(self.max_batch_size, self._caps.get(first.structure, self.max_batch_size))
        if self.max_batch_tokens is not None:
            cap = min(cap, max(1, self.max_batch_tokens // max(1, tokens_per_sample(first))))
        batch, samples = [first], first.num_samples
        if first.job.deterministic or self._shares.get(first.structure, frozenset()) is None:
            return batch
        for forward in ranked[1:]:
            fits = len(batch) < self.max_batch_size and samples + forward.num_samples <= max(cap, first.num_samples)
            if fits and forward.structure == first.structure and not forward.job.deterministic:
                batch.append(forward)
                samples += forward.num_samples
        return batch

    def _classify(self, forward: Forward) -> None:
        merger = Merger(self.axes.get(forward.component))
        forward.merger = merger
        forward.num_samples = merger.num_samples(forward.arguments)
        context = forward.context[0] if forward.context else None
        try:
            if forward.is_cached:
                raise CannotMergeError("the request has cache contexts of its own")
            structure = merger.structure(forward.arguments, forward.num_samples)
            forward.structure = (forward.component, context, structure)
        except CannotMergeError:
            forward.structure = ("alone", id(forward))

    @torch.no_grad()
    def _run_batch(self, batch: list[Forward]) -> None:
        if not batch:
            return
        started = time.perf_counter()
        self._solve(batch)
        seconds = time.perf_counter() - started
        samples = sum(f.num_samples for f in batch)
        if batch[0].structure[0] != "alone":  # type: ignore[index]
            self.costs.record(batch[0].structure, samples, seconds)
        self.statistics.batches += 1
        self.statistics.forwards += len(batch)
        self.statistics.merged += len(batch) if len(batch) > 1 else 0
        self.statistics.batch_sizes[len(batch)] = self.statistics.batch_sizes.get(len(batch), 0) + 1
        for forward in batch:
            forward.job.forwards += 1
            forward.job.merged_forwards += len(batch) > 1
            forward.job.seconds += seconds * forward.num_samples / samples
            forward.done.set()

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
        except BaseException as error:  # noqa: BLE001  (raised in the thread of the request)
            forward.error = error

    def _learn_cap(self, batch: list[Forward], error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._caps[batch[0].structure] = max(1, sum(f.num_samples for f in batch) // 2)
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
        if len(self._shares) >= MERGED_STRUCTURES_KEPT:
            self._shares.clear()
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
        if forward.activate is not None:
            forward.activate()
        output = call_directly(forward.module, forward.component, forward.context, (), arguments)
        self.synchronize()
        return output


def is_close(merged: Any, alone: Any) -> bool:
    """Whether a merged forward's output is the lone one's but for rounding."""
    for a, b in zip(tensors(merged), tensors(alone), strict=True):
        if a.shape != b.shape:
            return False
        largest = b.float().abs().max().clamp_min(1e-12)
        tolerance = TOLERANCE.get(b.dtype, HALF_TOLERANCE)
        if not bool((a.float() - b.float()).abs().max() <= tolerance * largest):
            return False
    return True


def tokens_per_sample(forward: Forward) -> int:
    """Positions of the noisy latents that one sample brings."""
    main: Iterable[Any] = tensors(forward.arguments)
    largest = max((t for t in main if t.is_floating_point() and t.ndim), key=torch.Tensor.numel, default=None)
    if largest is None:
        return 1
    return max(1, int(largest.numel()) // forward.num_samples // max(1, int(largest.shape[-1])))
