"""What is made from the tables is fresh, and names only what the table of metrics declares."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.metrics.dashboard.panels import ROWS
from deployments.metrics.dashboard.rules import ALERTS, RECORDED, Alert
from deployments.metrics.table import METRICS
from deployments.metrics.write import FILES
from tests.support.alert_cases import CASES
from tests.support.promql import labels_in, metrics_in, unknown_labels, unknown_values

ROOT = Path(__file__).resolve().parents[4]
PANELS = [panel for row in ROWS for panel in row.panels]
QUERIES = [query for panel in PANELS for query in panel.queries]
LABELS_OF_RECORDED = {recorded.name: {"application", "stage"} for recorded in RECORDED}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads((ROOT / "docs/dashboards/triptych.json").read_text())
    return made


@pytest.mark.parametrize("name", FILES)
def test_what_is_made_from_the_tables_is_fresh(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name](), "run: python -m deployments.metrics.write"


def test_every_query_names_declared_series_labels_and_values_only() -> None:
    expressions = [query.expression for query in QUERIES] + [rule.expression for rule in (*RECORDED, *ALERTS)]
    wrong = {
        each: (unknown_labels(each, LABELS_OF_RECORDED) - {"target"}, unknown_values(each))
        for each in expressions
        if unknown_labels(each, LABELS_OF_RECORDED) - {"target"} or unknown_values(each)
    }
    assert wrong == {}


def test_every_declared_metric_is_on_the_dashboard() -> None:
    shown = {metric.name for query in QUERIES for metric in metrics_in(query.expression)}
    assert set(METRICS) - shown == set()


def test_a_legend_names_labels_that_the_series_keep() -> None:
    for query in QUERIES:
        assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= labels_in(query.expression), query


def test_a_series_that_is_not_declared_is_found() -> None:
    with pytest.raises(KeyError):
        metrics_in("rate(ray_triptych_nothing_total[5m])")
    with pytest.raises(KeyError):
        metrics_in("rate(ray_triptych_requests[5m])")
    assert unknown_labels("sum by (shape) (ray_triptych_requests_open)", {}) == {"shape"}
    assert unknown_values('ray_triptych_jobs{status="lost"}') == {"lost"}


def test_the_dashboard_is_one_that_grafana_imports(dashboard: dict[str, Any]) -> None:
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "application"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert all("application" in target["expr"] for target in panel["targets"])


def test_no_panel_lies_over_another(dashboard: dict[str, Any]) -> None:
    def overlap(a: dict[str, int], b: dict[str, int]) -> bool:
        return (
            a["x"] < b["x"] + b["w"]
            and b["x"] < a["x"] + a["w"]
            and a["y"] < b["y"] + b["h"]
            and b["y"] < a["y"] + a["h"]
        )

    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert [pair for pair in combinations(places, 2) if overlap(*pair)] == []
    assert all(place["x"] + place["w"] <= 24 for place in places)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_says_what_it_is_and_what_to_do_and_has_a_case_of_each_outcome(alert: Alert) -> None:
    assert all((alert.summary, alert.description, alert.action))
    assert {case.fires for case in CASES if case.alert == alert.name} == {True, False}


def test_the_rules_are_groups_of_prometheus() -> None:
    groups = yaml.safe_load((ROOT / "docs/dashboards/rules.yaml").read_text())["groups"]
    names = [rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]]
    assert names == [rule.name for rule in (*RECORDED, *ALERTS)]
    assert len(set(names)) == len(names)
