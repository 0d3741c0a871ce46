"""Denoising never waits for the whole device, on a simulated one: the host is a turn ahead at every step."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.forking.command import python_with_libraries

ROOT = Path(__file__).resolve().parents[4]
STEPS = 10


@pytest.mark.parametrize(("name", "num_requests"), [("flux", 1), ("flux", 3), ("zimage", 2), ("sdxl", 2)])
def test_no_step_waits_for_the_device(name: str, num_requests: int, checkpoints_root: Path) -> None:
    command = [*python_with_libraries(), "-m", "tests.support.host_syncs", name, checkpoints_root, num_requests, STEPS]
    run = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout.splitlines()[-1])
    assert counts["device-wide"] == 0
    assert counts["idle waits"] <= num_requests, "the end of each request, whose numbers are read"
    assert counts.get("questions", 0) <= 4 * num_requests, "equal arguments once for each pair, not at every step"
    assert counts["waits for an earlier turn"] <= 2 * STEPS
    if num_requests > 1:
        assert counts["merged"] > 0
