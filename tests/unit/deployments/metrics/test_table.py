"""The table of metrics keeps Prometheus's conventions, and the code tells what it declares: all of it, nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from deployments.metrics.metric import OF_SERVE, OTHER, Label, LabelValues, Metric, hashed
from deployments.metrics.table import AREAS, METRICS
from tests.support.source import nodes_of

ROOT = Path(__file__).resolve().parents[4]
TELLING = {"count": "counter", "set": "gauge", "observe": "histogram"}
# Of Serve, of Prometheus, and of Ray's own (ray/_private/telemetry, stats/tag_defs).
RESERVED = {
    *OF_SERVE,
    "le",
    "quantile",
    "instance",
    "job",
    "SessionName",
    "WorkerId",
    "NodeAddress",
    "Version",
    "Component",
}
MOST_SERIES = 64 * 32 * 6


@cache
def told_in_the_code() -> tuple[tuple[str, str, frozenset[str], str], ...]:
    """Metric, method, labels and place of every call of a meter."""
    return tuple(
        (name, method, frozenset(keyword.arg or "**" for keyword in keywords), f"{file.relative_to(ROOT)}:{line}")
        for folder in ("serve_app", "deployments")
        for file in (ROOT / folder).rglob("*.py")
        if '"triptych_' in file.read_text(encoding="utf-8")  # to parse them all takes seconds
        for name, method, keywords, line in calls_in(file)
    )


def calls_in(file: Path) -> Iterator[tuple[str, str, list[ast.keyword], int]]:
    for node in nodes_of(file):
        match node:
            case ast.Call(
                func=ast.Attribute(attr=method), args=[ast.Constant(value=str(name)), *_], keywords=keywords
            ) if method in TELLING and name.startswith("triptych_"):
                yield name, method, keywords, node.lineno


def test_every_call_of_a_meter_names_a_declared_metric_with_its_kind_and_labels() -> None:
    wrong = [
        place
        for name, method, labels, place in told_in_the_code()
        if name not in METRICS or METRICS[name].kind != TELLING[method] or set(METRICS[name].labels) != labels
    ]
    assert wrong == []


def test_every_declared_metric_is_told_somewhere() -> None:
    assert {name for name, *_ in told_in_the_code()} == set(METRICS)


def test_nothing_but_the_meter_makes_a_metric_of_ray() -> None:
    makers = [
        str(file.relative_to(ROOT))
        for folder in ("serve_app", "deployments")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"ray\.(serve|util)(\.metrics|\s+import\s+.*metrics)", file.read_text())
    ]
    assert makers == ["deployments/metrics/serve_meter.py"]


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_a_metric_keeps_the_conventions_of_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"triptych(_[a-z0-9]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.removesuffix("_total").endswith(f"_{metric.unit}") or metric.unit in ("number", "share")
    assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|count|sum|bucket)(_|$)", metric.name)
    assert metric.help.endswith(".")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert not RESERVED & set(metric.labels)


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_the_series_of_a_metric_are_bounded_whatever_callers_send(metric: Metric) -> None:
    series = 1
    for label in metric.labels.values():
        assert bool(label.values) != bool(label.at_most), "either its values are known, or how many there are at most"
        series *= (len(label.values) or label.at_most) + 1
    assert series <= MOST_SERIES


def test_no_two_metrics_share_a_family_of_prometheus() -> None:
    families = [metric.name.removesuffix("_total") for area in AREAS.values() for metric in area.metrics]
    assert len(set(families)) == len(families)


def test_a_label_beyond_its_bound_is_other() -> None:
    values, size = LabelValues(), Label("of anything", at_most=2)
    assert [values.bounded(size, value) for value in "abcab"] == ["a", "b", OTHER, "a", "b"]
    assert values.bounded(Label("known", ("x",)), "y") == OTHER
    assert values.bounded(Label("another", at_most=2), "c") == "c"


def test_a_name_in_a_label_cannot_be_read() -> None:
    assert hashed("") == "none"
    assert re.fullmatch(r"[0-9a-f]{12}", hashed("somebody@example.com"))
    assert hashed("a") != hashed("b")
