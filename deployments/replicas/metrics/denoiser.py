"""What a denoiser measures, told to the meter of its replica."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from deployments.denoising.measurements import CheckpointMade, Resumed
from deployments.engine.statistics import BatchRun, Cancelled, StructureRefused
from deployments.features.cache_dit.measurements import CachedSteps
from deployments.metrics.meter import Meter

logger = logging.getLogger(__name__)


class DenoiserMetrics:
    """Takes the measurements of a DenoiserStage."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._unknown: set[type] = set()
        meter.begin("engine")

    def __call__(self, measurement: object) -> None:
        """A measurement without a row is left out, and the log names its type once."""
        kind = type(measurement)
        if kind in EXPORTS:
            EXPORTS[kind](self, measurement)
        elif kind not in self._unknown:
            self._unknown.add(kind)
            logger.warning("%s has no row in EXPORTS: it is not among the metrics", kind.__name__)

    def batch_run(self, turn: BatchRun) -> None:
        meter, component = self._meter, turn.component
        merged = str(turn.is_merged).lower()
        meter.observe("triptych_batch_size", turn.num_forwards, component=component)
        for outcome, count in (("ok", turn.num_forwards - turn.num_failed), ("error", turn.num_failed)):
            meter.count("triptych_forwards_total", count, component=component, merged=merged, outcome=outcome)
        meter.observe("triptych_step_seconds", turn.seconds, component=component, size=str(turn.num_forwards))
        meter.count("triptych_device_seconds_total", turn.seconds, component=component)
        meter.count("triptych_passes_together_total", turn.num_passes_together, component=component)
        for seconds in turn.queue_seconds:
            meter.observe("triptych_step_queue_seconds", seconds, component=component)

    def checkpoint_made(self, checkpoint: CheckpointMade) -> None:
        self._meter.observe("triptych_checkpoint_bytes", checkpoint.num_bytes)
        self._meter.observe("triptych_checkpoint_seconds", checkpoint.seconds)
        self._meter.count("triptych_checkpoints_made_bytes_total", checkpoint.num_bytes)

    def cached_steps(self, steps: CachedSteps) -> None:
        for kind, count in (("computed", steps.computed), ("reused", steps.reused)):
            self._meter.count("triptych_cached_steps_total", count, component=steps.component, kind=kind)

    def resumed(self, _: Resumed) -> None:
        self._meter.count("triptych_resumes_total")

    def structure_refused(self, refused: StructureRefused) -> None:
        self._meter.count("triptych_merges_refused_total", component=refused.component)

    def cancelled(self, _: Cancelled) -> None:
        self._meter.count("triptych_cancels_total")


EXPORTS: dict[type, Callable[[DenoiserMetrics, Any], None]] = {
    BatchRun: DenoiserMetrics.batch_run,
    CheckpointMade: DenoiserMetrics.checkpoint_made,
    CachedSteps: DenoiserMetrics.cached_steps,
    Resumed: DenoiserMetrics.resumed,
    Cancelled: DenoiserMetrics.cancelled,
    StructureRefused: DenoiserMetrics.structure_refused,
}
