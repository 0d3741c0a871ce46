"""What a denoiser measures goes to Ray Serve's metrics; a measurement without a row stops nobody."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest

from deployments.denoising.measurements import CheckpointMade, Resumed
from deployments.device_memory import DeviceMemory
from deployments.engine.fiber import CancelledStage
from deployments.engine.statistics import BatchRun, Cancelled, EngineStatistics, StructureRefused
from deployments.features.cache_dit.measurements import CachedSteps
from deployments.media.files import FileToWrite
from deployments.media.pool import Workers
from deployments.messages import GenerationRequest, MediaFile, OutputFormat
from deployments.observability.observer import StageWork
from deployments.replicas.metrics.adapters import AdapterMetrics
from deployments.replicas.metrics.denoiser import EXPORTS, DenoiserMetrics
from deployments.replicas.metrics.device import DeviceMetrics
from deployments.replicas.metrics.media import MediaMetrics
from deployments.replicas.metrics.stages import StageMetrics
from tests.support.recorded_meter import RecordedMeter


@dataclass(frozen=True)
class Planted:
    """Of a feature that has no row."""


def test_every_measurement_of_ours_has_a_row() -> None:
    assert set(EXPORTS) == {BatchRun, Cancelled, CachedSteps, CheckpointMade, Resumed, StructureRefused}


def test_a_measurement_without_a_row_is_left_out_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    told = DenoiserMetrics(RecordedMeter())
    with caplog.at_level(logging.WARNING):
        told(Planted())
        told(Planted())
    assert caplog.text.count("Planted has no row") == 1


# --- the device ---


def test_the_memory_of_a_device_is_told_by_the_stages_of_its_replica() -> None:
    memory = [DeviceMemory(3, 5, 4, out_of_memory=1), DeviceMemory(2, 5, 4, 1), DeviceMemory(2, 2, 4, 3)]
    meter = RecordedMeter()
    told = DeviceMetrics(meter, ("encoder", "vae"), lambda: memory.pop(0))
    told.look()
    stage = "encoder+vae"
    held = meter.stands_at["triptych_device_memory_bytes"]
    assert held == {(stage, "allocated"): 3, (stage, "reserved"): 5, (stage, "peak"): 4}
    told.look()
    told.look()
    assert held == {(stage, "allocated"): 2, (stage, "reserved"): 2, (stage, "peak"): 4}
    assert meter.counted["triptych_out_of_memory_total"] == {(stage,): 3}


def test_the_busy_share_is_that_of_the_last_minute() -> None:
    meter, now, statistics = RecordedMeter(), [0.0], EngineStatistics()
    told = DeviceMetrics(meter, ("denoiser",), lambda: None, statistics, lambda: now[0])
    share = meter.stands_at["triptych_engine_busy_share"]

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
    assert "triptych_device_memory_bytes" not in meter.stands_at, "nobody counts it here"


def test_the_seconds_of_the_device_add_up_by_component() -> None:
    meter = RecordedMeter()
    told = DenoiserMetrics(meter)
    for seconds in (0.5, 0.25, 0.0):
        told(BatchRun("transformer", "16x64", 2, 2, seconds, (0.1, 0.2), True))
    assert meter.counted["triptych_device_seconds_total"] == {("transformer",): 0.75}


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


def test_adapters_in_memory_and_what_was_loaded_are_told_by_tier() -> None:
    library: Any = Adapters()
    meter = RecordedMeter()
    told = AdapterMetrics(meter, ("denoiser",), [library])
    told.look()
    told.look()
    assert meter.stands_at["triptych_adapters"] == {("denoiser", "device"): 2, ("denoiser", "host"): 5}
    assert meter.stands_at["triptych_adapter_bytes"] == {("denoiser", "device"): 20, ("denoiser", "host"): 60}
    assert meter.counted["triptych_adapter_lookups_total"] == {
        ("denoiser", "host", "hits"): 8,
        ("denoiser", "device", "misses"): 1,
    }
    assert meter.observed["triptych_adapter_load_seconds"] == {("denoiser", "device"): [0.25, 0.25]}


# --- the stages ---


def work() -> StageWork:
    return StageWork("denoiser", GenerationRequest("1", "m", {}, 0, OutputFormat("image", "png")), 0.0, bytes_in=7)


def test_requests_in_a_stage_are_told_as_waiting_and_as_working() -> None:
    meter = RecordedMeter()
    told, first, second = StageMetrics(meter, ("denoiser",)), work(), work()
    with told.present(first), told.present(second):
        with told.around(first):
            first.step()
            first.step()
            told.look(True, {"denoiser": 1.5})
            assert meter.stands_at["triptych_stage_present"] == {
                ("denoiser", "waiting"): 1,
                ("denoiser", "working"): 1,
            }
            first.bytes_out = 9
        with pytest.raises(CancelledStage), told.around(second):
            raise CancelledStage
        with pytest.raises(ValueError), told.around(second):
            raise ValueError
    told.look(False, {"denoiser": 2.0})

    assert set(meter.stands_at["triptych_stage_present"].values()) == {0}
    assert meter.stands_at["triptych_stage_replicas"] == {("denoiser",): 0}
    assert meter.counted["triptych_stage_busy_seconds_total"] == {("denoiser",): 2.0}
    assert meter.counted["triptych_steps_total"] == {(): 2}
    outcomes = {outcome: count for (_, outcome), count in meter.counted["triptych_stage_requests_total"].items()}
    assert outcomes == {"ok": 1, "cancelled": 1, "error": 1}
    assert meter.counted["triptych_stage_bytes_total"] == {("denoiser", "in"): 21, ("denoiser", "out"): 9}
    assert len(meter.observed["triptych_stage_seconds"]["denoiser",]) == 3


# --- files ---


class Pool:
    """One of two workers is busy; one has died."""

    def workers(self) -> Workers:
        return Workers(idle=1, busy=1, deaths=1)

    def write(self, _: Any) -> MediaFile:
        return MediaFile(b"12345", "image/png")


def test_files_and_the_workers_that_write_them_are_told() -> None:
    meter, pool, file = RecordedMeter(), Pool(), FileToWrite("png")
    told = MediaMetrics(meter, pool)  # type: ignore[arg-type]
    assert told.write(file).data == b"12345"
    told.look()
    told.look()
    assert meter.counted["triptych_media_bytes_total"] == {("png",): 5}
    assert list(meter.observed["triptych_media_seconds"]) == [("png",)]
    assert meter.stands_at["triptych_media_workers"] == {("idle",): 1, ("busy",): 1}
    assert meter.counted["triptych_media_worker_deaths_total"] == {(): 1}
