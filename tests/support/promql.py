"""What an expression of PromQL names, as far as ours go: metrics and labels."""

from __future__ import annotations

import re
from collections.abc import Mapping

from deployments.metrics.metric import NAMESPACE, OF_SERVE, Metric
from deployments.metrics.table import METRICS

NAME = re.compile(rf"\b{NAMESPACE}(triptych_\w+)")
RECORDED = re.compile(r"\b(\w+:triptych_\w+:\w+)")
LABELS = re.compile(r"(?:by|on)\s*\(([^)]*)\)")
MATCHED = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
FREE = {*OF_SERVE, "le", "instance"}  # of Serve, of histograms, of Prometheus


def metrics_in(expression: str) -> list[Metric]:
    """The declared metrics whose series it reads. Raises KeyError for a series that none of them has."""
    series = {f"{metric.name}{suffix}": metric for metric in METRICS.values() for suffix in SUFFIXES[metric.kind]}
    return [series[name] for name in NAME.findall(expression)]


def unknown_labels(expression: str, recorded: Mapping[str, set[str]]) -> set[str]:
    """Labels that it asks for and none of its series has; `recorded`: those of recorded series, by their names."""
    known = set(FREE)
    for metric in metrics_in(expression):
        known |= set(metric.labels)
    for name in RECORDED.findall(expression):
        known |= recorded[name]
    return labels_in(expression) - known


def unknown_values(expression: str) -> set[str]:
    """Values of closed labels that it asks for and that are never told."""
    labels = {name: label for metric in metrics_in(expression) for name, label in metric.labels.items()}
    asked = [(name, value) for name, how, value in MATCHED.findall(expression) if how == "=" and name in labels]
    return {value for name, value in asked if labels[name].values and value not in labels[name].values}


def labels_in(expression: str) -> set[str]:
    listed = [name.strip() for names in LABELS.findall(expression) for name in names.split(",")]
    return {name for name in (*listed, *(name for name, _, _ in MATCHED.findall(expression))) if name}
