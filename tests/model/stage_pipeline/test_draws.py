"""A request draws the same numbers on every device, and what runs beside it changes none of them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.draws_on_simulated_device import DRAWS
from tests.support.forking.command import python_with_libraries

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    command = [*python_with_libraries(), "-m", "tests.support.draws_on_simulated_device"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("draw", DRAWS)
def test_a_generator_of_the_cpu_draws_for_the_device_what_it_draws_for_the_cpu(
    draw: str, report: dict[str, Any]
) -> None:
    assert "Expected a 'npu' device type for generator but found 'cpu'" in report["refused"][draw]
    assert report["alike"][draw]


def test_requests_that_take_turns_draw_as_if_each_were_alone(report: dict[str, Any]) -> None:
    """From the device's global generator too, of which there is one."""
    assert report["together"] == report["alone"]
    assert len({tuple(output) for output in report["alone"]}) == 3


def test_a_denoiser_that_is_handed_the_generator_draws_with_it(report: dict[str, Any]) -> None:
    assert report["handed on"] == report["handed on alone"]
    assert report["handed on"] != report["alone"]


def test_the_states_of_the_devices_generator_travel_and_come_back(report: dict[str, Any]) -> None:
    assert report["states come back"]
    assert report["remote call"]


def test_nothing_is_left_in_the_threads(report: dict[str, Any]) -> None:
    assert report["modes left"] == report["in the engine's thread"] == 0


def test_on_the_cpu_nothing_stands_between_a_pipeline_and_torch() -> None:
    from deployments.tensors.draws import draws_for

    with draws_for(torch.device("cpu")):
        assert torch._C._len_torch_function_stack() == 0
