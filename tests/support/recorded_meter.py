"""A meter that keeps what it is told, and takes nothing that the table does not declare."""

from __future__ import annotations

from collections import defaultdict

from deployments.metrics.metric import Kind, Metric
from deployments.metrics.table import AREAS, METRICS

Labels = tuple[str, ...]


class RecordedMeter:
    """`values`: by the name of the metric and its labels' values in the order of the table: the sum of a counter,
    the last value of a gauge, all events of a histogram."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.counted: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        self.stands_at: dict[str, dict[Labels, float]] = defaultdict(dict)
        self.observed: dict[str, dict[Labels, list[float]]] = defaultdict(lambda: defaultdict(list))

    def begin(self, area: str, /, **known: tuple[str, ...]) -> None:
        assert AREAS[area].metrics
        self.begun.append(area)

    def count(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        assert value >= 0
        key = declared(name, "counter", labels)
        if value:
            self.counted[name][key] += value

    def set(self, name: str, value: float, /, **labels: str) -> None:
        self.stands_at[name][declared(name, "gauge", labels)] = value

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        self.observed[name][declared(name, "histogram", labels)].append(value)


def declared(name: str, kind: Kind, labels: dict[str, str]) -> Labels:
    """The labels' values in the order of the table."""
    metric: Metric = METRICS[name]
    assert metric.kind == kind, f"{name} is a {metric.kind}"
    metric.check(labels)
    for label, value in labels.items():
        allowed = metric.labels[label].values
        assert not allowed or value in allowed, f"{name}: {label} is one of {allowed}, not {value!r}"
    return tuple(labels[label] for label in metric.labels)
