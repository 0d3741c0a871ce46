"""What a replica measures, as metrics of Ray Serve (Prometheus); each has the tags of its replica beside its own."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.denoising.measurements import CheckpointMade, Resumed
from deployments.device_memory import DeviceMemory
from deployments.engine.statistics import BatchRun, Cancelled, EngineStatistics
from deployments.features.cache_dit.measurements import CachedSteps

logger = logging.getLogger(__name__)

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
BYTES = [1e4, 1e5, 1e6, 1e7, 1e8, 1e9]
SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
BUSY_OVER_S = 60.0  # the time of which the engine's busy share is told


class DenoiserMetrics:
    """Takes the measurements of a DenoiserStage; made in the constructor of a replica, whose tags it carries."""

    def __init__(self) -> None:
        component = ("component",)
        self._batch_size = Histogram(
            "triptych_batch_size", "Forwards that one turn of the device ran.", SIZES, component
        )
        self._forwards = Counter("triptych_forwards", "Forwards of denoisers.", ("component", "merged", "outcome"))
        self._step_seconds = Histogram(
            "triptych_step_seconds", "Seconds of one turn of the device.", SECONDS, ("component", "shape", "size")
        )
        self._device_seconds = Counter(
            "triptych_device_seconds", "Seconds of the device in forwards of denoisers.", component
        )
        self._queue_seconds = Histogram(
            "triptych_step_queue_seconds", "Seconds that a forward waited for the device.", SECONDS, component
        )
        self._cached_steps = Counter(
            "triptych_cached_steps", "Steps under Cache-DiT, computed or reused.", ("component", "kind")
        )
        self._checkpoint_bytes = Histogram("triptych_checkpoint_bytes", "Bytes of a checkpoint.", BYTES)
        self._checkpoint_seconds = Histogram("triptych_checkpoint_seconds", "Seconds to make a checkpoint.", SECONDS)
        self._resumes = Counter("triptych_resumes", "Requests that went on here from a checkpoint.")
        self._cancels = Counter("triptych_cancels", "Requests that were cancelled here.")
        self._unknown: set[type] = set()

    def __call__(self, measurement: object) -> None:
        """A measurement without a row is left out, and the log names its type once."""
        kind = type(measurement)
        if kind in EXPORTS:
            EXPORTS[kind](self, measurement)
        elif kind not in self._unknown:
            self._unknown.add(kind)
            logger.warning("%s has no row in EXPORTS: it is not among the metrics", kind.__name__)

    def batch_run(self, turn: BatchRun) -> None:
        component = {"component": turn.component}
        merged = str(turn.is_merged).lower()
        self._batch_size.observe(turn.num_forwards, component)
        for outcome, count in (("ok", turn.num_forwards - turn.num_failed), ("error", turn.num_failed)):
            if count:
                self._forwards.inc(count, {**component, "merged": merged, "outcome": outcome})
        self._step_seconds.observe(turn.seconds, {**component, "shape": turn.shape, "size": str(turn.num_forwards)})
        if turn.seconds > 0:
            self._device_seconds.inc(turn.seconds, component)
        for seconds in turn.queue_seconds:
            self._queue_seconds.observe(seconds, component)

    def checkpoint_made(self, checkpoint: CheckpointMade) -> None:
        self._checkpoint_bytes.observe(checkpoint.num_bytes)
        self._checkpoint_seconds.observe(checkpoint.seconds)

    def cached_steps(self, steps: CachedSteps) -> None:
        for kind, count in (("computed", steps.computed), ("reused", steps.reused)):
            if count:
                self._cached_steps.inc(count, {"component": steps.component, "kind": kind})

    def resumed(self, _: Resumed) -> None:
        self._resumes.inc()

    def cancelled(self, _: Cancelled) -> None:
        self._cancels.inc()


class DeviceMetrics:
    """The memory of a replica on its device, and how busy its engine is; told at each look."""

    def __init__(
        self,
        stages: Iterable[str],
        memory: Callable[[], DeviceMemory | None],
        engine: EngineStatistics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory` returns None where nobody counts it; `engine`: of the denoiser, where it is among the stages."""
        self._stage = {"stage": "+".join(stages)}
        self._memory, self._engine, self._clock = memory, engine, clock
        self._out_of_memory_before = 0
        self._seen: deque[tuple[float, float]] = deque()  # the time, and the busy seconds until then
        self._bytes = Gauge(
            "triptych_device_memory_bytes",
            "Bytes of the device, allocated, reserved or at the peak.",
            ("stage", "kind"),
        )
        self._out_of_memory = Counter(
            "triptych_out_of_memory", "Times that the device had less memory than was asked for.", ("stage",)
        )
        self._busy_share = Gauge(
            "triptych_engine_busy_share", "Share of the last minute in which the device made forwards.", ("stage",)
        )

    def look(self) -> None:
        """Cheap: it asks the host only."""
        memory = self._memory()
        if memory is not None:
            for kind in ("allocated", "reserved", "peak"):
                self._bytes.set(getattr(memory, kind), {**self._stage, "kind": kind})
            new = memory.out_of_memory - self._out_of_memory_before
            self._out_of_memory_before = memory.out_of_memory
            if new > 0:
                self._out_of_memory.inc(new, self._stage)
        if self._engine is not None:
            self._busy_share.set(self._share_of_the_last_minute(self._engine.seconds), self._stage)

    def _share_of_the_last_minute(self, busy_s: float) -> float:
        now, seen = self._clock(), self._seen
        seen.append((now, busy_s))
        while len(seen) > 2 and now - seen[1][0] >= BUSY_OVER_S:
            seen.popleft()
        then, busy_then_s = seen[0]
        return min(1.0, (busy_s - busy_then_s) / (now - then)) if now > then else 0.0


EXPORTS: dict[type, Callable[[DenoiserMetrics, Any], None]] = {
    BatchRun: DenoiserMetrics.batch_run,
    CheckpointMade: DenoiserMetrics.checkpoint_made,
    CachedSteps: DenoiserMetrics.cached_steps,
    Resumed: DenoiserMetrics.resumed,
    Cancelled: DenoiserMetrics.cancelled,
}
