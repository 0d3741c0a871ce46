"""The meter of a replica tells Ray's metrics, bounded, and counters from 0 on."""

from __future__ import annotations

from typing import ClassVar

import pytest
from ray.serve.metrics import Counter

from deployments.metrics import serve_meter
from deployments.metrics.metric import OTHER
from deployments.metrics.serve_meter import ServeMeter


class Instrument:
    """In place of a metric of Serve: what was told, in order."""

    made: ClassVar[dict[str, Instrument]] = {}

    def __init__(self, name: str, *_: object) -> None:
        assert name not in self.made
        self.told: list[tuple[float, dict[str, str]]] = []
        self.made[name] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((value, tags))

    def _record(self, value: float, tags: dict[str, str]) -> None:
        self.told.append((value, tags))

    set = observe = inc


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Instrument]:
    monkeypatch.setattr(Instrument, "made", {})
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(serve_meter, kind, Instrument)
    return Instrument.made


def test_counters_with_known_labels_stand_at_0_when_they_begin(made: dict[str, Instrument]) -> None:
    ServeMeter().begin("stages", stage=("vae",))
    busy, outcomes = made["triptych_stage_busy_seconds_total"], made["triptych_stage_requests_total"]
    assert busy.told == [(0, {"stage": "vae"})]
    assert outcomes.told == [(0, {"stage": "vae", "outcome": outcome}) for outcome in ("ok", "error", "cancelled")]
    assert "triptych_stage_seconds" not in made, "a histogram would count an event"


def test_counters_with_an_open_label_begin_with_their_first_event(made: dict[str, Instrument]) -> None:
    meter = ServeMeter()
    meter.begin("keys")
    assert made == {}
    meter.count("triptych_key_made_total", key="a")
    meter.count("triptych_key_made_total", 0, key="a")
    assert made["triptych_key_made_total"].told == [(1.0, {"key": "a"})]


def test_more_values_than_the_table_allows_become_other(made: dict[str, Instrument]) -> None:
    meter = ServeMeter()
    for number in range(101):
        meter.count("triptych_key_made_total", key=str(number))
    assert made["triptych_key_made_total"].told[-1] == (1.0, {"key": OTHER})


def test_other_labels_than_those_of_the_table_are_refused(made: dict[str, Instrument]) -> None:
    with pytest.raises(ValueError, match="triptych_key_made_total has the labels"):
        ServeMeter().count("triptych_key_made_total", owner="a")


def test_a_counter_of_ray_takes_0_below_inc(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter("triptych_of_a_test_total", "Of a test.", ("kind",))
    recorded: list[tuple[float, dict[str, str]]] = []
    metric = type("Metric", (), {"record": lambda _, value, tags: recorded.append((value, tags))})()
    monkeypatch.setattr(counter, "_metric", metric)
    counter._record(0, tags={"kind": "x"})
    assert recorded == [(0, {"kind": "x"})]
