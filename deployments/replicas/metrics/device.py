"""The memory of a replica on its device, and how busy its engine is, told to its meter."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from deployments.device_memory import DeviceMemory
from deployments.engine.statistics import EngineStatistics
from deployments.metrics.meter import Meter

BUSY_OVER_S = 60.0  # the time of which the engine's busy share is told


class DeviceMetrics:
    """The memory of a replica on its device, and how busy its engine is; told at each look."""

    def __init__(
        self,
        meter: Meter,
        stages: Iterable[str],
        memory: Callable[[], DeviceMemory | None],
        engine: EngineStatistics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`memory` returns None where nobody counts it; `engine`: of the denoiser, where it is among the stages."""
        self._meter, self._process = meter, "+".join(stages)
        self._memory, self._engine, self._clock = memory, engine, clock
        self._out_of_memory_before = 0
        self._seen: deque[tuple[float, float]] = deque()  # the time, and the busy seconds until then
        meter.begin("device", stage=(self._process,))

    def look(self) -> None:
        """Cheap: it asks the host only."""
        meter, process, memory = self._meter, self._process, self._memory()
        if memory is not None:
            for kind in ("allocated", "reserved", "peak"):
                meter.set("triptych_device_memory_bytes", getattr(memory, kind), stage=process, kind=kind)
            new = memory.out_of_memory - self._out_of_memory_before
            self._out_of_memory_before = memory.out_of_memory
            meter.count("triptych_out_of_memory_total", max(0, new), stage=process)
        if self._engine is not None:
            share = self._share_of_the_last_minute(self._engine.seconds)
            meter.set("triptych_engine_busy_share", share, stage=process)

    def _share_of_the_last_minute(self, busy_s: float) -> float:
        now, seen = self._clock(), self._seen
        seen.append((now, busy_s))
        while len(seen) > 2 and now - seen[1][0] >= BUSY_OVER_S:
            seen.popleft()
        then, busy_then_s = seen[0]
        return min(1.0, (busy_s - busy_then_s) / (now - then)) if now > then else 0.0
