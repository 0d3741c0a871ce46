"""Messages leave and reach a device beside its forwards: on streams of their own, in one go, with one wait."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.tensors import copies
from deployments.tensors.copies import Numbers, beside_forwards, queued_so_far, to_device, to_host
from tests.support.forking.command import python_with_libraries

ROOT = Path(__file__).resolve().parents[4]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    command = [*python_with_libraries(), "-m", "tests.support.copies_on_simulated_device"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    told: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return told


def test_what_goes_to_a_device_and_back_keeps_its_numbers_its_strides_and_its_identity(report: dict[str, Any]) -> None:
    assert report["same"]
    assert report["strides"]
    assert report["once"], "a tensor at two places of a message crosses once"
    assert report["on_the_cpu"], "what was in memory of the CPU stays there"


def test_no_copy_is_on_the_stream_of_the_forwards_and_none_makes_the_host_wait_alone(report: dict[str, Any]) -> None:
    for direction, to in (("outward", "host"), ("inward", "device")):
        seen = report[direction]
        assert [(way, on_a_side_stream, blocks) for way, _, on_a_side_stream, blocks in seen["copies"]] == [
            (to, True, False)
        ] * 3
        assert sorted(size for _, size, *_ in seen["copies"]) == [56, 64, 240]
        assert seen["waits"] == [["event", True]], "one wait for all of them, for the copies' own stream"


def test_memory_that_came_on_one_stream_is_kept_for_the_stream_that_reads_it(report: dict[str, Any]) -> None:
    assert report["read_on"] == [""], "the usual one"


def test_a_question_about_numbers_beside_the_forwards_waits_for_its_own_stream(report: dict[str, Any]) -> None:
    assert report["beside"]["waits"] == [["_local_scalar_dense", True]]


def test_the_cpu_has_no_streams_and_its_tensors_are_copied_all_the_same() -> None:
    assert queued_so_far(CPU) is None
    tensor = torch.arange(6.0).reshape(2, 3)
    with beside_forwards(CPU, None):
        [copy] = to_host([tensor])
    tensor += 1
    assert copy.tolist() == [[0, 1, 2], [3, 4, 5]]
    [made] = to_device([Numbers(copy.view(torch.uint8).numpy().reshape(-1), torch.float32, (2, 3))], CPU)
    made.zero_()
    assert copy.sum() == 15


def test_tensors_lie_in_a_staging_buffer_where_any_dtype_may() -> None:
    places, end = copies._places([1, 0, 65, 64])
    assert (places, end) == ([0, 64, 64, 192], 256)
