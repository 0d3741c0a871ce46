"""What a replica measures of its LoRAs, told to its meter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from deployments.metrics.meter import Meter

if TYPE_CHECKING:
    from deployments.adapters.library import AdapterLibrary

EVENTS = ("hits", "misses", "evictions")


class AdapterMetrics:
    """The adapters in memory, and what has been loaded; told at each look, which is cheap."""

    def __init__(self, meter: Meter, stages: Iterable[str], library: AdapterLibrary) -> None:
        self._meter, self._process = meter, "+".join(stages)
        self._library = library
        self._told: dict[tuple[str, str], int] = {}
        meter.begin("adapters", stage=(self._process,), tier=("device", "host"))

    def look(self) -> None:
        """Serve asks for it every few seconds."""
        meter, process, found = self._meter, self._process, self._library.describe()
        for tier in ("device", "host"):
            meter.set("triptych_adapters", found[tier]["adapters"], stage=process, tier=tier)
            meter.set("triptych_adapter_bytes", found[tier]["bytes"], stage=process, tier=tier)
            for event in EVENTS:
                count = found[event].get(tier, 0)
                new = count - self._told.get((tier, event), 0)
                meter.count("triptych_adapter_lookups_total", new, stage=process, tier=tier, event=event)
                self._told[tier, event] = count
        for tier, seconds in self._library.take_seconds():
            meter.observe("triptych_adapter_load_seconds", seconds, stage=process, tier=tier)
