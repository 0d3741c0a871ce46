"""One scrape of a node, as far as our metrics go."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass

from deployments.metrics.metric import NAMESPACE

LINE = re.compile(rf"{NAMESPACE}(triptych_\w+?)(_bucket|_sum|_count|_created)?\{{(.*)\}} (\S+)")
TYPE = re.compile(rf"# TYPE {NAMESPACE}(triptych_\w+) (\w+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Sample:
    """`name` without Ray's prefix and without the suffix of a histogram's parts."""

    name: str
    part: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Scrape:
    """What one node offers."""

    kinds: dict[str, str]  # counter, gauge or histogram, by name
    samples: list[Sample]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a counter or gauge, or of a histogram's events, over all processes."""
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == name and sample.part in ("", "_count") and labels.items() <= sample.labels.items()
        )


def scrape(port: int) -> Scrape:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return parsed(answer.read().decode())


def parsed(text: str) -> Scrape:
    """Prometheus's text format."""
    kinds = dict(TYPE.findall(text))
    histograms = {name for name, kind in kinds.items() if kind == "histogram"}
    return Scrape(kinds, [_sample(found, histograms) for found in LINE.finditer(text)])


def _sample(found: re.Match[str], histograms: set[str]) -> Sample:
    name, part, labels, value = (
        found.group(1),
        found.group(2) or "",
        dict(LABEL.findall(found.group(3))),
        found.group(4),
    )
    if name not in histograms:  # triptych_checkpoints_count would be a name like any other
        name, part = name + part, ""
    return Sample(name, part, labels, float(value))
