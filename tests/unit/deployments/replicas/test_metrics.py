"""What a denoiser measures goes to Ray Serve's metrics; a measurement without a row stops nobody."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from deployments.denoising.measurements import CheckpointMade, Resumed
from deployments.device_memory import DeviceMemory
from deployments.engine.statistics import BatchRun, Cancelled, EngineStatistics
from deployments.features.cache_dit.measurements import CachedSteps
from deployments.replicas import adapter_metrics, metrics
from deployments.replicas.adapter_metrics import AdapterMetrics
from deployments.replicas.metrics import EXPORTS, DenoiserMetrics, DeviceMetrics


@dataclass(frozen=True)
class Planted:
    """Of a feature that has no row."""


def test_every_measurement_of_ours_has_a_row() -> None:
    assert set(EXPORTS) == {BatchRun, Cancelled, CachedSteps, CheckpointMade, Resumed}


def test_a_measurement_without_a_row_is_left_out_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    told = DenoiserMetrics()
    with caplog.at_level(logging.WARNING):
        told(Planted())
        told(Planted())
    assert caplog.text.count("Planted has no row") == 1


# --- the device ---


class Recorder:
    """In place of a metric of Serve: the newest value by its tags, or their sum."""

    made: ClassVar[dict[str, Recorder]] = {}

    def __init__(self, name: str, *_: object) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        Recorder.made[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags.values())] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags.values())] = self.values.get(tuple(tags.values()), 0.0) + value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.set(value, tags)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    monkeypatch.setattr(Recorder, "made", {})
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(metrics, kind, Recorder)
        monkeypatch.setattr(adapter_metrics, kind, Recorder)
    return Recorder.made


def test_the_memory_of_a_device_is_told_by_the_stages_of_its_replica(recorded: dict[str, Recorder]) -> None:
    memory = [DeviceMemory(3, 5, 4, out_of_memory=1), DeviceMemory(2, 5, 4, 1), DeviceMemory(2, 2, 4, 3)]
    told = DeviceMetrics(("encoder", "vae"), lambda: memory.pop(0))
    told.look()
    stage = "encoder+vae"
    held = recorded["triptych_device_memory_bytes"].values
    assert held == {(stage, "allocated"): 3, (stage, "reserved"): 5, (stage, "peak"): 4}
    told.look()
    told.look()
    assert held == {(stage, "allocated"): 2, (stage, "reserved"): 2, (stage, "peak"): 4}
    assert recorded["triptych_out_of_memory"].values == {(stage,): 3}


def test_the_busy_share_is_that_of_the_last_minute(recorded: dict[str, Recorder]) -> None:
    now, statistics = [0.0], EngineStatistics()
    told = DeviceMetrics(("denoiser",), lambda: None, statistics, lambda: now[0])
    share = recorded["triptych_engine_busy_share"].values

    def after(seconds: float, busy_s: float) -> float:
        now[0] += seconds
        statistics.seconds += busy_s
        told.look()
        return share["denoiser",]

    assert after(0, 0) == 0
    assert after(10, 5) == 0.5
    assert after(30, 30) == pytest.approx(35 / 40)
    assert [after(10, 0) for _ in range(12)][-1] == 0
    assert after(10, 11) <= 1
    assert recorded["triptych_device_memory_bytes"].values == {}, "nobody counts it here"


def test_the_seconds_of_the_device_add_up_by_component(recorded: dict[str, Recorder]) -> None:
    told = DenoiserMetrics()
    for seconds in (0.5, 0.25, 0.0):
        told(BatchRun("transformer", "16x64", 2, 2, seconds, (0.1, 0.2), True))
    assert recorded["triptych_device_seconds"].values == {("transformer",): 0.75}


# --- adapters ---


class Adapters:
    """A library that has some, and found more of them on the host than before."""

    hits = 2

    def describe(self) -> dict[str, Any]:
        self.hits += 3
        device, host = {"adapters": 2, "bytes": 20}, {"adapters": 5, "bytes": 60}
        return {
            "device": device,
            "host": host,
            "hits": {"host": self.hits},
            "misses": {"device": 1},
            "evictions": {},
        }

    def take_seconds(self) -> list[tuple[str, float]]:
        return [("device", 0.25)]


def test_adapters_in_memory_and_what_was_loaded_are_told_by_tier(recorded: dict[str, Recorder]) -> None:
    library: Any = Adapters()
    told = AdapterMetrics(("denoiser",), library)
    told.look()
    told.look()
    assert recorded["triptych_adapters"].values == {("denoiser", "device"): 2, ("denoiser", "host"): 5}
    assert recorded["triptych_adapter_bytes"].values == {("denoiser", "device"): 20, ("denoiser", "host"): 60}
    assert recorded["triptych_adapter_lookups"].values == {
        ("denoiser", "host", "hits"): 8,
        ("denoiser", "device", "misses"): 1,
    }
    assert recorded["triptych_adapter_load_seconds"].values == {("denoiser", "device"): 0.25}
