"""Values of the Helm chart as Helm sees them, and the Serve config that the chart makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "ray_configs/kubernetes/triptych"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))


def values_of(example: Path) -> dict[str, Any]:
    return merged(read(CHART / "values.yaml"), read(example))


def read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return values


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays values over a chart's own: mappings are mixed at every depth, all else is replaced."""
    both = {**under, **over}
    for name in under.keys() & over.keys():
        if isinstance(under[name], Mapping) and isinstance(over[name], Mapping):
            both[name] = merged(under[name], over[name])
    return both


def serve_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `triptych.serveConfig` of templates/_helpers.tpl makes, without the names of the cluster's services."""
    serve = values["serve"]
    application = {
        "name": serve["application"],
        "route_prefix": serve["routePrefix"],
        "import_path": "serve_app.app:build_app",
        "runtime_env": {"env_vars": serve["variables"]},
        "args": serve["args"],
        "deployments": [{"name": name, **options} for name, options in serve["deployments"].items()],
    }
    if serve["autoscalingPolicy"]:
        application["autoscaling_policy"] = serve["autoscalingPolicy"]
    return {"http_options": {"host": "0.0.0.0", "port": 8000, **serve["httpOptions"]}, "applications": [application]}
