"""Between two steps of a request nothing crosses to the host and nobody waits for the device, on a simulated one."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.forking.command import python_with_libraries

ROOT = Path(__file__).resolve().parents[4]
MODELS = ("flux", "wan22")  # one expert and two; a scheduler that keeps nothing and one that keeps what it has seen


def counted(model: str, folder: Path, *options: str) -> dict[str, Any]:
    command = [
        *python_with_libraries(),
        "-m",
        "tests.support.traffic_on_simulated_device",
        str(folder),
        model,
        *options,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("model", MODELS)
def test_a_step_copies_nothing_and_waits_for_nothing(model: str, checkpoints_root: Path) -> None:
    added = counted(model, checkpoints_root)["per_step"]
    # UniPC sends a few coefficients, and the boundary of two experts is a number that the pipeline itself reads. The
    # engine waits for the events of earlier turns (test_host_syncs), and never for the whole device.
    schedulers_own = {"to the device waiting"} if model == "wan22" else set()
    pipelines_own = {"engine: aten._local_scalar_dense.default", "engine: copy"} if model == "wan22" else set()
    assert what(added["copies"]) <= schedulers_own
    assert {name.partition(",")[0] for name in added["waits"]} <= pipelines_own | {"engine: event"}


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_leaves_in_another_thread_on_another_stream_with_one_wait(
    model: str, checkpoints_root: Path
) -> None:
    added = counted(model, checkpoints_root, "--checkpoint-every", "1")["per_step"]
    to_the_host = {name for name in added["copies"] if "to the host" in name}
    assert to_the_host == {"sender: to the host, a side stream"}
    ours = {name: times for name, (times, _) in added["waits"].items() if name.startswith("sender")}
    assert sum(ours.values()) == 2, "for the copies on the device, and for those to the host"


def what(seen: dict[str, Any]) -> set[str]:
    return {name.split(": ")[1].split(",")[0] for name in seen}


@pytest.mark.parametrize("placement", ["three_stage", "one_stage"])
def test_what_is_handed_over_is_on_a_stream_of_its_own(placement: str, checkpoints_root: Path) -> None:
    copies = counted("flux", checkpoints_root, "--placement", placement)["per_request"]["copies"]
    ours = {name for name in copies if name.startswith("request")}
    assert ours == {"request: to the device, a side stream", "request: to the host, a side stream"}
    decoded = {name for name in copies if name.startswith("decode") and "side stream" in name}
    assert decoded == (set() if placement == "one_stage" else {"decode: to the device, a side stream"})
