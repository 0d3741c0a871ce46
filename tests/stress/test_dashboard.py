"""Each query of the dashboard and of the rules against a real Prometheus that scraped a real server under load."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest

from deployments.metrics.dashboard.panels import RANGE, ROWS, Panel
from deployments.metrics.dashboard.rules import ALERTS, RECORDED
from deployments.metrics.metric import Metric
from deployments.metrics.table import METRICS
from tests.support.prometheus import (
    NO_PROMETHEUS,
    Prometheus,
    has_prometheus,
    played_exporter,
    running_prometheus,
    scraped_exporter,
    scraped_ray,
)
from tests.support.served_application import ROOT
from tests.support.watched_load import load, watched_application

pytestmark = [pytest.mark.timeout(3600), pytest.mark.skipif(not has_prometheus(), reason=NO_PROMETHEUS)]

LOAD_S = 100.0
LAST_LOOKS_S = 25.0  # Ray passes metrics on every 10 s, Prometheus asks every 5 s
PANELS = {f"{row.title}: {panel.title}": panel for row in ROWS for panel in row.panels}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen the load, and an exporter that plays what only a GPU and S3 have."""
    folder = tmp_path_factory.mktemp("watched")
    rules = (ROOT / "docs/dashboards/rules.yaml",)
    with (
        watched_application(folder) as application,
        played_exporter(played_text) as port,
        running_prometheus(folder / "prometheus", [scraped_ray(), scraped_exporter(port)], rules) as prometheus,
    ):
        load(application, LOAD_S)
        assert {200, 202, 400} <= set(application.statuses)
        time.sleep(LAST_LOOKS_S)
        yield prometheus


def played_text() -> str:
    """Every metric of an application `played`, whose counters count seconds."""
    return "".join(played_family(metric) for metric in METRICS.values())


def played_family(metric: Metric) -> str:
    labels = {"application": "played", "deployment": "Played", "replica": "p"}
    labels |= {name: (label.values or ("x",))[0] for name, label in metric.labels.items()}
    series, value = ",".join(f'{name}="{text}"' for name, text in labels.items()), time.time() % 1e6
    name, kind = f"ray_{metric.name}", f"# TYPE ray_{metric.name} {metric.kind}\n"
    if metric.kind != "histogram":
        return f"{kind}{name}{{{series}}} {value}\n"
    buckets = "".join(f'{name}_bucket{{{series},le="{bound:g}"}} {value}\n' for bound in (*metric.buckets, math.inf))
    return f"{kind}{buckets.replace('inf', '+Inf')}{name}_sum{{{series}}} {value}\n{name}_count{{{series}}} {value}\n"


def asked_for(expression: str, application: str) -> str:
    """As Grafana asks."""
    return expression.replace("$application", application).replace(RANGE, "2m")


@pytest.mark.parametrize("name", PANELS)
def test_no_panel_is_empty(prometheus: Prometheus, name: str) -> None:
    panel: Panel = PANELS[name]
    application = "played" if panel.needs else "triptych"
    asked = [asked_for(query.expression, application) for query in panel.queries]
    empty = [expression for expression in asked if not prometheus.shown(expression)]
    assert empty == []


def test_every_rule_is_evaluated_and_what_is_recorded_has_series(prometheus: Prometheus) -> None:
    health = prometheus.rules()
    assert health == {rule.name: "ok" for rule in (*RECORDED, *ALERTS)}
    assert [rule.name for rule in RECORDED if not prometheus.query(f'{rule.name}{{application="triptych"}}')] == []


def test_what_the_load_did_is_what_the_metrics_say(prometheus: Prometheus) -> None:
    def total(metric: str) -> float:
        # Of replicas that are gone too: one that made a resume may have been killed since.
        found = prometheus.query(f'sum(max_over_time(ray_{metric}{{application="triptych"}}[1h]))')
        return sum(float(series["value"][1]) for series in found)

    assert total("triptych_recoveries_total") > 0, "a denoiser was killed"
    assert total("triptych_resumes_total") > 0
    assert total("triptych_cached_steps_total") > 0
    assert total("triptych_webhooks_total") > 0
    assert total("triptych_adapter_lookups_total") > 0
    assert total("triptych_jobs_ended_total") > 0
