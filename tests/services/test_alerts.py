"""The rules of docs/dashboards, held by promtool: each alert fires when it should, and not when it should not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.metrics.dashboard.panels import RANGE, ROWS
from deployments.metrics.dashboard.rules import RECORDED
from deployments.metrics.metric import Metric
from tests.support.alert_cases import promtool_file
from tests.support.prometheus import NO_PROMETHEUS, has_prometheus, promtool
from tests.support.promql import metrics_in
from tests.support.served_application import ROOT

RULES = ROOT / "docs/dashboards/rules.yaml"
OF_HISTOGRAMS = [query.expression for row in ROWS for panel in row.panels for query in panel.queries]
OF_HISTOGRAMS = [each for each in (*OF_HISTOGRAMS, *(rule.expression for rule in RECORDED)) if "_bucket" in each]

pytestmark = [pytest.mark.rest, pytest.mark.skipif(not has_prometheus(), reason=NO_PROMETHEUS)]


def test_the_rules_are_valid() -> None:
    checked = promtool("check", "rules", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(promtool_file(str(RULES))))
    tested = promtool("test", "rules", str(file))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_events_with_which_a_histogram_begins_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    cases = [a_histogram_begins(expression) for expression in OF_HISTOGRAMS]
    file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "15s", "tests": cases}))
    tested = promtool("test", "rules", str(file))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def a_histogram_begins(expression: str) -> dict[str, Any]:
    """It has no series at first, then five events, and no further one."""
    metric = metrics_in(expression)[0]
    asked = expression.replace("$application", "a").replace(RANGE, "1m").replace("5m", "1m")
    return {
        "name": expression,
        "interval": "15s",
        "input_series": [{"series": name, "values": f"_x8 {value}x8"} for name, value in five_events(metric)],
        "promql_expr_test": [
            {
                "expr": f"count(({asked}) > 0)",
                "eval_time": "150s",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        ],
    }


def five_events(metric: Metric) -> Iterator[tuple[str, float]]:
    """The series of the histogram, and what each stands at."""
    labels = {"application": "a", "deployment": "D", "replica": "r"} | dict.fromkeys(metric.labels, "x")
    series, middle = ",".join(f'{name}="{value}"' for name, value in labels.items()), metric.buckets[1]
    for bound in (*metric.buckets, math.inf):
        le = f"{bound:g}".replace("inf", "+Inf")
        yield f'ray_{metric.name}_bucket{{{series},le="{le}"}}', 5 * (bound >= middle)
    yield f"ray_{metric.name}_count{{{series}}}", 5
    yield f"ray_{metric.name}_sum{{{series}}}", 5 * middle
