"""What a replica measures of its LoRAs, as metrics of Ray Serve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.replicas.metrics import SECONDS

if TYPE_CHECKING:
    from deployments.adapters.library import AdapterLibrary

EVENTS = ("hits", "misses", "evictions")


class AdapterMetrics:
    """The adapters in memory, and what has been loaded; told at each look, which is cheap."""

    def __init__(self, stages: Iterable[str], library: AdapterLibrary) -> None:
        self._stage = {"stage": "+".join(stages)}
        self._library = library
        self._told: dict[tuple[str, str], int] = {}
        tags = ("stage", "tier")
        self._adapters = Gauge("triptych_adapters", "LoRAs in memory, by device and host.", tags)
        self._bytes = Gauge("triptych_adapter_bytes", "Bytes of LoRAs in memory, by device and host.", tags)
        self._lookups = Counter(
            "triptych_adapter_lookups", "LoRAs that were asked for: hits, misses; evictions.", (*tags, "event")
        )
        self._seconds = Histogram("triptych_adapter_load_seconds", "Seconds that loading a LoRA took.", SECONDS, tags)

    def look(self) -> None:
        """Serve asks for it every few seconds."""
        found = self._library.describe()
        for tier in ("device", "host"):
            tags = {**self._stage, "tier": tier}
            self._adapters.set(found[tier]["adapters"], tags)
            self._bytes.set(found[tier]["bytes"], tags)
            for event in EVENTS:
                count = found[event].get(tier, 0)
                if new := count - self._told.get((tier, event), 0):
                    self._lookups.inc(new, {**tags, "event": event})
                self._told[tier, event] = count
        for tier, seconds in self._library.take_seconds():
            self._seconds.observe(seconds, {**self._stage, "tier": tier})
