"""`triptych serve`: which config is written for which machine, and what is started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.plan.measured import Measured
from serve_app.tools import launch, plan
from serve_app.tools.command import machine
from serve_app.tools.command.exits import CommandError
from serve_app.tools.command.main import run
from serve_app.tools.command.subcommands import serving
from serve_app.tools.launch import Address
from tests.support.measured_models import flux

FLUX = flux(1024, denoiser=0.49, vae=1.61)
Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are started, in place of Ray; a machine without a driver; a model that is measured at once."""
    files: list[Path] = []

    def start(file: Path, tell_ready: Any = None) -> int:
        files.append(file)
        print("Checking ...")
        (tell_ready or launch.print_ready)(Address("127.0.0.1", 8000, "")) if tell_ready else None
        return 0

    monkeypatch.setattr(launch, "run", start)
    monkeypatch.setattr(plan, "run_measure", lambda order, environment: FLUX)
    with_driver(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return files


def with_driver(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    for module in (machine, serving):
        monkeypatch.setattr(module, "lines_of_driver", lambda: list(lines))


def test_a_plan_for_the_named_card_is_shown_written_and_started(started: list[Path], capsys: Said) -> None:
    assert run(["serve", "org/FLUX.1-dev", "--gpu", "24GB", "--port", "9000"]) == 0
    assert started == [Path("outputs/serve_FLUX.1-dev.yaml")]
    told = capsys.readouterr().out
    assert "for 24GB: " in told
    assert "outputs/serve_FLUX.1-dev.yaml" in told
    config = yaml.safe_load(started[0].read_text())
    assert config["http_options"] == {"host": "127.0.0.1", "port": 9000}
    [application] = config["applications"]
    assert application["args"]["model"] == "org/FLUX.1-dev"
    assert application["runtime_env"]["env_vars"] == {"SGLANG_DIFFUSION_TARGET_DEVICE": "cuda"}


def test_without_a_gpu_a_model_is_served_on_the_cpu_and_that_is_said(started: list[Path], capsys: Said) -> None:
    assert run(["serve", "checkpoints/emoji-flux", "--placement", "two_stage", "--write", "here.yaml"]) == 0
    assert "on the CPU: no GPU was found here" in capsys.readouterr().out
    [application] = yaml.safe_load(Path("here.yaml").read_text())["applications"]
    assert application["runtime_env"]["env_vars"] == {"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}
    assert application["args"] == {"model": "checkpoints/emoji-flux", "placement": "two_stage"}
    assert [each["name"] for each in application["deployments"]] == ["EncoderVAE", "Denoiser"]


def test_the_gpus_of_the_machine_are_planned_for(
    started: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    with_driver(monkeypatch, "NVIDIA GeForce RTX 4090, 24564, 8.9", "NVIDIA GeForce RTX 4090, 24564, 8.9")
    assert run(["serve", "org/m"]) == 0
    assert "This machine has RTX 4090, RTX 4090: the plan is for these." in capsys.readouterr().out
    [application] = yaml.safe_load(started[0].read_text())["applications"]
    assert application["autoscaling_policy"]["policy_function"] == "serve_app.autoscaling:ReplicaRatio"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("NVIDIA GB10, [N/A], 12.1", "nvidia-smi does not tell the memory of NVIDIA GB10: name a size with --gpu"),
        ("NVIDIA L4, 23034, 8.9", "--gpus 2: this machine has 1"),
    ],
)
def test_what_the_driver_does_not_have_is_not_planned_for(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    with_driver(monkeypatch, line)
    assert run(["serve", "org/m", "--gpus", "2"]) != 0
    assert said in capsys.readouterr().err


def test_one_of_two_gpus_may_be_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    with_driver(monkeypatch, *["NVIDIA L40S, 46068, 8.9"] * 2)
    assert run(["serve", "org/m", "--gpus", "1"]) == 0
    assert "the plan is for 1 of these." in capsys.readouterr().out


def test_a_config_that_was_changed_is_kept(started: list[Path], capsys: Said) -> None:
    Path("my.yaml").write_text("changed")
    assert run(["serve", "org/m", "--gpu", "H100", "--write", "my.yaml"]) == 0
    assert Path("my.yaml~").read_text() == "changed"
    assert "What stood there is my.yaml~ now." in capsys.readouterr().out


def test_a_line_of_the_driver_is_a_card() -> None:
    card = machine.card_in("NVIDIA H200, 143771, 9.0")
    assert (card.name, card.num_bytes, card.capability) == ("H200", 143_771 << 20, (9, 0))
    assert machine.card_in("GRID, 1024, [N/A]").capability is None


CARDS = ("GPU-aa11, NVIDIA L4, 23034, 8.9", "GPU-ab22, NVIDIA L4, 23034, 8.9", "GPU-cc33, NVIDIA L4, 23034, 8.9")
MIXED = (*CARDS, "GPU-dd44, NVIDIA H200, 143771, 9.0")
BY_PLACE = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    ("lines", "environ", "found"),
    [
        (MIXED, {}, [0, 1, 2, 3]),
        (CARDS, {"CUDA_VISIBLE_DEVICES": "1"}, [1]),
        (CARDS, {"CUDA_VISIBLE_DEVICES": " 2, 0"}, [2, 0]),
        (CARDS, {"CUDA_VISIBLE_DEVICES": ""}, []),
        (CARDS, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        (CARDS, {"CUDA_VISIBLE_DEVICES": "0,-1,1"}, [0]),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "GPU-d,GPU-ab22"}, [3, 1]),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "3", **BY_PLACE}, [3]),
        ((), {"CUDA_VISIBLE_DEVICES": ""}, []),
    ],
)
def test_the_gpus_are_those_that_cuda_may_use(
    lines: tuple[str, ...], environ: dict[str, str], found: list[int]
) -> None:
    assert machine.visible(lines, environ) == [lines[each].split(", ", 1)[1] for each in found]


@pytest.mark.parametrize(
    ("lines", "environ", "said"),
    [
        (CARDS, {"CUDA_VISIBLE_DEVICES": "3"}, "CUDA_VISIBLE_DEVICES=3: 3 is 0 of the 3 GPUs of this machine"),
        (CARDS, {"CUDA_VISIBLE_DEVICES": "GPU-a"}, "GPU-a is 2 of the 3 GPUs"),
        (CARDS, {"CUDA_VISIBLE_DEVICES": "MIG-1"}, "does not tell the size of MIG-1: name one with --gpu"),
        (MIXED, {"CUDA_VISIBLE_DEVICES": "3"}, "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name UUIDs"),
    ],
)
def test_a_gpu_that_cannot_be_told_by_the_driver_is_refused_by_name(
    lines: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    with pytest.raises(CommandError, match=re.escape(said)):
        machine.visible(lines, environ)


def test_a_dry_run_writes_and_starts_nothing(started: list[Path], tmp_path: Path, capsys: Said) -> None:
    assert run(["serve", "org/m", "--gpu", "H100", "--dry-run", "--json"]) == 0
    assert (started, list(tmp_path.iterdir())) == ([], [])
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert yaml.safe_load(told["config"])["applications"][0]["args"]["model"] == "org/m"
    assert told["plan"]["plan"]["choice"]["placement"] == "three_stage"
    assert "for H100: " in said.err


def test_json_is_one_document_when_the_server_is_ready(capsys: Said) -> None:
    assert run(["serve", "org/m", "--gpu", "H100", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["url"] == "http://127.0.0.1:8000"
    assert "Checking ..." in said.err


def test_a_config_is_started_as_it_is(started: list[Path]) -> None:
    assert run(["serve", "my.yaml"]) == 0
    assert started == [Path("my.yaml")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serve my.yaml --port 9000", "--port: for a MODEL; my.yaml says it itself"),
        ("serve my.yaml --gpu 24GB", "--gpu: for a MODEL; my.yaml says it itself"),
        ("serve m --precision fp8", "--precision: for a plan, and no GPU was found here: name one with --gpu"),
        ("serve m --gpus 2", "--gpus: for a plan, and no GPU was found here"),
        ("serve m --gpu 24GB --precision gguf_q4", "GGUF needs a file"),
        ("serve m --gpu 24XB", "gpu '24XB' must be a size such as 24GB"),
        ("serve m --port 0", "0 is not in the range"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(line: str, said: str, started: list[Path], capsys: Said) -> None:
    assert run(line.split()) == 2
    assert said in capsys.readouterr().err
    assert started == []


def test_where_nothing_fits_nothing_is_started(started: list[Path], capsys: Said) -> None:
    assert run(["serve", "m", "--gpu", "2GB"]) == 1
    assert started == []
    assert "nothing fits" in capsys.readouterr().err


def test_a_model_that_cannot_be_looked_at_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setattr(plan, "run_measure", lambda *_: Measured("m", problem="m has no model_index.json"))
    assert run(["serve", "m", "--gpu", "24GB"]) == 1
    assert "m cannot be planned for: m has no model_index.json" in capsys.readouterr().err
