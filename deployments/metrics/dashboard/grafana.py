"""The dashboard as Grafana imports it, made from the table of panels."""

from __future__ import annotations

import json
from typing import Any

from deployments.metrics.dashboard.panels import ROWS, Panel, Row

COLUMNS, WIDTH, HEIGHT = 24, 8, 7  # Grafana's grid; of a panel
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> str:
    """The file, as JSON."""
    return json.dumps(model(), indent=1) + "\n"


def model() -> dict[str, Any]:
    """Grafana's JSON model, of the version that 10 and later import."""
    return {
        "title": "Triptych",
        "uid": "triptych",
        "description": "Made from deployments/metrics/dashboard/panels.py.",
        "tags": ["triptych", "ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), _application()]},
        "annotations": {"list": []},
        "panels": _panels(),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _application() -> dict[str, Any]:
    query = "label_values(ray_triptych_model_info, application)"
    return {
        "name": "application",
        "label": "Application",
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "application"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels() -> list[dict[str, Any]]:
    placed: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        placed.append(_title(row, len(placed) + 1, y))
        y += 1
        for index, panel in enumerate(row.panels):
            x = index * WIDTH % COLUMNS
            placed.append(_panel(panel, len(placed) + 1, x, y + index * WIDTH // COLUMNS * HEIGHT))
        y += -(-len(row.panels) * WIDTH // COLUMNS) * HEIGHT
    return placed


def _title(row: Row, id: int, y: int) -> dict[str, Any]:
    position = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
    return {"id": id, "type": "row", "title": row.title, "collapsed": False, "gridPos": position, "panels": []}


def _panel(panel: Panel, id: int, x: int, y: int) -> dict[str, Any]:
    needs = f"Needs {panel.needs}." if panel.needs else ""
    return {
        "id": id,
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(filter(None, (panel.help, needs))),
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + n),
                "datasource": DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
            }
            for n, query in enumerate(panel.queries)
        ],
    }
