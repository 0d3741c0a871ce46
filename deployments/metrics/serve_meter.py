"""The meter of a replica: it tells Ray Serve's metrics, which every node offers to Prometheus."""

from __future__ import annotations

import threading
from itertools import product
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.metrics.metric import Kind, LabelValues, Metric
from deployments.metrics.table import AREAS, METRICS


class ServeMeter:
    """Made in a replica, whose application, deployment and id its metrics get as labels too."""

    def __init__(self) -> None:
        self._values = LabelValues()
        self._instruments: dict[str, Any] = {}
        self._lock = threading.Lock()

    def begin(self, area: str, /, **known: tuple[str, ...]) -> None:
        for metric in AREAS[area].metrics:
            values = [known.get(name) or label.values for name, label in metric.labels.items()]
            if metric.kind == "counter" and all(values):
                for each in product(*values):
                    tags = self._tags(metric, dict(zip(metric.labels, each, strict=True)))
                    self._instrument(metric)._record(0, tags=tags)  # `inc` takes no 0, and what it calls does

    def count(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        counter, tags = self._found(name, "counter", labels)
        if value > 0:
            counter.inc(value, tags)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        gauge, tags = self._found(name, "gauge", labels)
        gauge.set(value, tags)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        histogram, tags = self._found(name, "histogram", labels)
        histogram.observe(value, tags)

    def _found(self, name: str, kind: Kind, labels: dict[str, str]) -> tuple[Any, dict[str, str]]:
        metric = METRICS[name]
        if metric.kind != kind:
            raise ValueError(f"{name} is a {metric.kind}, no {kind}")
        return self._instrument(metric), self._tags(metric, labels)

    def _tags(self, metric: Metric, labels: dict[str, str]) -> dict[str, str]:
        metric.check(labels)
        with self._lock:
            return {name: self._values.bounded(metric.labels[name], value) for name, value in labels.items()}

    def _instrument(self, metric: Metric) -> Any:
        with self._lock:
            if metric.name not in self._instruments:
                self._instruments[metric.name] = _opened(metric)
            return self._instruments[metric.name]


def _opened(metric: Metric) -> Any:
    names = tuple(metric.labels)
    match metric.kind:
        case "counter":
            return Counter(metric.name, metric.help, names)
        case "gauge":
            return Gauge(metric.name, metric.help, names)
        case "histogram":
            return Histogram(metric.name, metric.help, list(metric.buckets), names)
