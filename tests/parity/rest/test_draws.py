"""Pipelines that draw by themselves make on a device with strict generators what they make on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import drawing

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", [model.name for model in drawing.MODELS])
def test_a_pipeline_that_draws_by_itself_runs_on_a_device(name: str, checkpoints_root: Path) -> None:
    command = [sys.executable, "-m", "tests.support.pipelines_on_simulated_device", str(checkpoints_root), name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    difference = json.loads(run.stdout.splitlines()[-1])[name]
    assert isinstance(difference, float), difference
    assert difference < 1e-3
