"""What a replica measures of its LoRAs, told to its meter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from deployments.metrics.meter import Meter

if TYPE_CHECKING:
    from deployments.adapters.library import AdapterLibrary

EVENTS = ("hits", "misses", "evictions")


class AdapterMetrics:
    """The adapters in memory, and what has been loaded; told at each look, which is cheap."""

    def __init__(self, meter: Meter, stages: Iterable[str], libraries: Sequence[AdapterLibrary]) -> None:
        """`libraries`: those of its models."""
        self._meter, self._process = meter, "+".join(stages)
        self._libraries = libraries
        self._told: dict[tuple[str, str], int] = {}
        meter.begin("adapters", stage=(self._process,), tier=("device", "host"))

    def look(self) -> None:
        """Serve asks for it every few seconds."""
        meter, process = self._meter, self._process
        found = [library.describe() for library in self._libraries]
        for tier in ("device", "host"):
            held = {number: sum(each[tier][number] for each in found) for number in ("adapters", "bytes")}
            meter.set("triptych_adapters", held["adapters"], stage=process, tier=tier)
            meter.set("triptych_adapter_bytes", held["bytes"], stage=process, tier=tier)
            for event in EVENTS:
                count = sum(each[event].get(tier, 0) for each in found)
                new = count - self._told.get((tier, event), 0)
                meter.count("triptych_adapter_lookups_total", new, stage=process, tier=tier, event=event)
                self._told[tier, event] = count
        for tier, seconds in (each for library in self._libraries for each in library.take_seconds()):
            meter.observe("triptych_adapter_load_seconds", seconds, stage=process, tier=tier)
