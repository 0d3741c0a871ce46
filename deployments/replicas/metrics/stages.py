"""The requests in the stages of a replica, told to its meter."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from deployments.engine.fiber import CancelledStage
from deployments.messages import StageName
from deployments.metrics.meter import Meter
from deployments.observability.observer import Observer, StageWork


class StageMetrics(Observer):
    """Watches the requests as an observer of the replica, and is told how busy the stages are at each look."""

    def __init__(self, meter: Meter, stages: tuple[StageName, ...]) -> None:
        self._meter, self._stages = meter, stages
        self._lock = threading.Lock()
        self._present, self._working = Counter[StageName](), Counter[StageName]()
        self._steps = 0  # not yet told: a step is too short to tell each
        self._busy_before_s = dict.fromkeys(stages, 0.0)
        meter.begin("stages", stage=stages)

    def look(self, is_healthy: bool, busy_s: Mapping[StageName, float]) -> None:
        """`busy_s`: seconds since the start in which the stage had a request in work. Cheap: nobody is asked."""
        meter = self._meter
        for stage in self._stages:
            meter.set("triptych_stage_replicas", float(is_healthy), stage=stage)
            with self._lock:
                present, working = self._present[stage], self._working[stage]
            meter.set("triptych_stage_present", max(0, present - working), stage=stage, state="waiting")
            meter.set("triptych_stage_present", working, stage=stage, state="working")
            meter.count("triptych_stage_busy_seconds_total", busy_s[stage] - self._busy_before_s[stage], stage=stage)
            self._busy_before_s[stage] = busy_s[stage]
        with self._lock:
            steps, self._steps = self._steps, 0
        meter.count("triptych_steps_total", steps)

    @contextmanager
    def present(self, work: StageWork) -> Iterator[None]:
        self._change(self._present, work.stage, 1)
        try:
            yield
        finally:
            self._change(self._present, work.stage, -1)

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        meter, stage, began = self._meter, work.stage, time.time()
        meter.observe("triptych_stage_queue_seconds", max(0.0, began - work.arrived), stage=stage)
        work.on_step.append(self._step)
        self._change(self._working, stage, 1)
        outcome = "ok"
        try:
            yield
        except CancelledStage:
            outcome = "cancelled"
            raise
        except BaseException:
            outcome = "error"
            raise
        finally:
            self._change(self._working, stage, -1)
            meter.observe("triptych_stage_seconds", max(0.0, time.time() - began), stage=stage)
            meter.count("triptych_stage_requests_total", stage=stage, outcome=outcome)
            for direction, num_bytes in (("in", work.bytes_in), ("out", work.bytes_out)):
                meter.count("triptych_stage_bytes_total", num_bytes, stage=stage, direction=direction)

    def _change(self, counts: Counter[StageName], stage: StageName, by: int) -> None:
        with self._lock:
            counts[stage] += by

    def _step(self) -> None:
        with self._lock:
            self._steps += 1
