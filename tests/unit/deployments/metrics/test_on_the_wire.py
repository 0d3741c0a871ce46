"""What Ray's agent writes for Prometheus has the names of the table, with Ray's prefix and nothing else."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

from deployments.metrics.metric import Metric
from deployments.metrics.table import METRICS
from tests.support.promql import SUFFIXES
from tests.support.scrape import Scrape, parsed


@pytest.fixture(scope="module")
def scrape() -> Scrape:
    """As Ray's agent makes it of one value of each metric: counters stand at 0."""
    recorder = OpenTelemetryMetricRecorder()
    registering = {
        "counter": recorder.register_counter_metric,
        "gauge": recorder.register_gauge_metric,
        "histogram": lambda name, help: recorder.register_histogram_metric(name, help, list(METRICS[name].buckets)),
    }
    for metric in METRICS.values():
        registering[metric.kind](metric.name, metric.help)
        recorder.set_metric_value(metric.name, dict.fromkeys(metric.labels, "x"), float(metric.kind != "counter"))
    return parsed(generate_latest().decode())


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_a_metric_has_its_name_its_kind_and_its_labels(scrape: Scrape, metric: Metric) -> None:
    samples = [sample for sample in scrape.samples if sample.name == metric.name]
    assert scrape.kinds[metric.name] == metric.kind
    assert {sample.part for sample in samples} == set(SUFFIXES[metric.kind])
    assert all(set(metric.labels) <= set(sample.labels) for sample in samples)
    assert scrape.total(metric.name) == (metric.kind != "counter")
