"""The rules of docs/dashboards, held by promtool: each alert fires when it should, and not when it should not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.support.alert_cases import promtool_file
from tests.support.prometheus import NO_PROMETHEUS, has_prometheus, promtool
from tests.support.served_application import ROOT

RULES = ROOT / "docs/dashboards/rules.yaml"

pytestmark = [pytest.mark.rest, pytest.mark.skipif(not has_prometheus(), reason=NO_PROMETHEUS)]


def test_the_rules_are_valid() -> None:
    checked = promtool("check", "rules", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(promtool_file(str(RULES))))
    tested = promtool("test", "rules", str(file))
    assert tested.returncode == 0, tested.stdout + tested.stderr
