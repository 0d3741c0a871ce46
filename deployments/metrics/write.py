"""Writes what is made from the tables: `python -m deployments.metrics.write`, from the root of the repository."""

from __future__ import annotations

from pathlib import Path

from deployments.metrics.dashboard.grafana import dashboard
from deployments.metrics.dashboard.rules import rules_file
from deployments.metrics.page import page

FILES = {
    "docs/metrics.md": page,
    "docs/dashboards/triptych.json": dashboard,
    "docs/dashboards/rules.yaml": rules_file,
}


def main(root: Path = Path()) -> None:
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    main()
