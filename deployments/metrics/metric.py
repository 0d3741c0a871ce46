"""What a metric and a label are: the rows of `deployments.metrics.table`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

OTHER = "other"  # the value of a label that has no room for one more
NAMESPACE = "ray_"  # Ray's, before every name that Prometheus reads
OF_SERVE = ("application", "deployment", "replica")  # labels that Serve adds to every metric of a replica


@dataclass(frozen=True)
class Label:
    """What a label says. Its values are `values`, or the first `at_most` that a process meets and then OTHER."""

    help: str
    values: tuple[str, ...] = ()
    at_most: int = 0

    @property
    def is_open(self) -> bool:
        """Its values are not known before."""
        return not self.values


@dataclass(frozen=True)
class Metric:
    """A row of the table. Prometheus reads it as NAMESPACE and the name."""

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, Label] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()  # upper bounds, of a histogram

    @property
    def unit(self) -> str:
        """As the name says it."""
        return next((unit for unit in ("seconds", "bytes", "share") if f"_{unit}" in self.name), "number")

    def check(self, labels: Mapping[str, str]) -> None:
        """Raises ValueError for other labels than its own."""
        if set(labels) != set(self.labels):
            raise ValueError(f"{self.name} has the labels {tuple(self.labels)}, not {tuple(labels)}")


@dataclass(frozen=True)
class Area:
    """Metrics that belong together, and which processes tell them."""

    title: str
    told_by: str
    metrics: tuple[Metric, ...]


class LabelValues:
    """The labels of one process: each has at most as many values as its row says, whatever callers send."""

    def __init__(self) -> None:
        self._seen: dict[Label, set[str]] = {}

    def bounded(self, label: Label, value: str) -> str:
        """`value`, or OTHER where it is one too many."""
        seen = self._seen.setdefault(label, set())
        if value in label.values or value in seen:
            return value
        if label.is_open and len(seen) < label.at_most:
            seen.add(value)
            return value
        return OTHER


def hashed(name: str) -> str:
    """Stands in a label for a name that not everybody may read: 12 digits of its SHA-256; "none" for no name."""
    return hashlib.sha256(name.encode()).hexdigest()[:12] if name else "none"
