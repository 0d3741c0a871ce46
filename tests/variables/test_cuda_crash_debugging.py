"""The five variables of the kernel API log on a real replica on the CPU: what it writes, where, and of what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.proofs import proof
from tests.support.whole_replica import MakeReplica

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def run(make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path) -> Any:
    """The log of a replica and one picture with these variables, by default in a file and at level 1."""

    def run(**variables: str) -> str:
        file = tmp_path / "kernels.log"
        file.unlink(missing_ok=True)
        named = {f"SGLANG_KERNEL_API_{name}": value for name, value in variables.items()}
        defaults = {
            "SGLANG_KERNEL_API_LOGLEVEL": "1",
            "SGLANG_KERNEL_API_LOGDEST": str(file),
            "SGLANG_KERNEL_API_DUMP_DIR": str(tmp_path / "dumps"),
        }
        make_replica(flux_checkpoint, **defaults | named).generate(2)
        return file.read_text() if file.exists() else ""

    return run


def called(log: str) -> set[str]:
    return set(re.findall(r"Kernel API Call: (\S+)", log))


def dumped(folder: Path) -> set[str]:
    return {re.sub(r".*_pid\d+_(.*)_call\d+", r"\1", dump.name) for dump in folder.iterdir()}


COMPONENTS = {
    "diffusion.text_encoder.forward",
    "diffusion.text_encoder_2.forward",
    "diffusion.transformer.forward",
    "diffusion.vae.decode",
}


@proof("real replica on CPU")
def test_sglang_kernel_api_loglevel_adds_names_then_metadata_then_statistics(run: Any) -> None:
    assert run(LOGLEVEL="0") == ""
    names, metadata, statistics = (run(LOGLEVEL=level) for level in ("1", "3", "5"))
    assert called(names) == called(metadata) == called(statistics) >= COMPONENTS
    assert any(name.startswith("attention.") for name in called(names))
    assert ["shape=" in log for log in (names, metadata, statistics)] == [False, True, True]
    assert ["nan_count=" in log for log in (names, metadata, statistics)] == [False, False, True]


@proof("real replica on CPU")
def test_sglang_kernel_api_logdest_is_where_the_lines_go(run: Any, tmp_path: Path, capfd: Any) -> None:
    for stream in ("stdout", "stderr"):
        capfd.readouterr()
        assert run(LOGDEST=stream) == ""
        captured = capfd.readouterr()
        assert called(getattr(captured, stream.removeprefix("std"))) >= COMPONENTS
    run(LOGDEST=str(tmp_path / "of-%i.log"))
    [file] = tmp_path.glob("of-*.log")
    assert re.fullmatch(r"of-\d+\.log", file.name)
    assert called(file.read_text()) >= COMPONENTS


@proof("real replica on CPU")
def test_sglang_kernel_api_dump_dir_gets_the_inputs_and_outputs_at_level_10(run: Any, tmp_path: Path) -> None:
    run(LOGLEVEL="5")
    assert not (tmp_path / "dumps").exists()
    run(LOGLEVEL="10", DUMP_DIR=str(tmp_path / "elsewhere"), DUMP_INCLUDE="diffusion.vae.decode")
    [dump] = (tmp_path / "elsewhere").iterdir()
    outputs = torch.load(dump / "outputs.pt", weights_only=True)
    assert [tuple(tensor.shape) for tensor in outputs.values()] == [(1, 3, 32, 32)]


@proof("real replica on CPU")
def test_sglang_kernel_api_dump_include_chooses_what_is_dumped(run: Any, tmp_path: Path) -> None:
    log = run(LOGLEVEL="10", DUMP_INCLUDE="diffusion.text_*")
    assert dumped(tmp_path / "dumps") == {"diffusion.text_encoder.forward", "diffusion.text_encoder_2.forward"}
    assert called(log) >= COMPONENTS, "lines are not filtered"


@proof("real replica on CPU")
def test_sglang_kernel_api_dump_exclude_leaves_out(run: Any, tmp_path: Path) -> None:
    run(LOGLEVEL="10", DUMP_INCLUDE="diffusion.*", DUMP_EXCLUDE="*.forward,nothing")
    assert dumped(tmp_path / "dumps") == {"diffusion.vae.decode"}
