"""The command that plans a model's memory, what it writes, and the warnings of what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.plan.budget import Levers
from deployments.plan.measured import Measured
from deployments.plan.process import MeasureOrder
from serve_app.app import AppArgs
from serve_app.tools import check_config, fits, plan
from tests.support.measured_models import calls, component, flux, wan

FLUX = flux(1024, denoiser=0.49, vae=1.61)


class Walk:
    """In place of the process: what was ordered, and the measurement to come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured, self.orders = FLUX, list[MeasureOrder]()
        monkeypatch.setattr(plan, "run_measure", self)
        monkeypatch.setattr(fits, "run_measure", self)

    def __call__(self, order: MeasureOrder, environment: dict[str, str]) -> Measured:
        self.orders.append(order)
        return self.measured


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Walk:
    return Walk(monkeypatch)


def test_the_size_the_frames_and_the_dtype_are_ordered(walk: Walk) -> None:
    asked = "org/m --gpu H100 --size 1280x720 --num-frames 81 --dtype bfloat16 --variant fp16"
    assert plan.main(asked.split()) == 0
    [order] = walk.orders
    assert (order.width, order.height, order.num_frames) == (1280, 720, 81)
    assert (order.model.path, order.model.dtype, order.model.variant) == ("org/m", "bfloat16", "fp16")


def test_the_report_has_weights_activations_what_fits_and_why(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["org/m", "--gpu", "24GB"]) == 0
    text = capsys.readouterr().out
    assert "FluxPipeline of FLUX.1-dev, 1024x1024" in text
    [row] = [line.split() for line in text.splitlines() if line.startswith("transformer (denoiser)")]
    assert row[2:5] == ["bfloat16", "23.80", "47.60"]
    assert "on one card, 24GB (24.0 GB, of which 23.3 GB are counted on)" in text
    assert "for 24GB: " in text
    assert "- Transformer and text_encoder_2 in fp8, because weights as they are loaded would need at least " in text


def test_json_holds_what_was_measured_and_the_plan(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["org/m", "--gpu", "H100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"]["components"][0]["weights"]["bf16"] == 23_800_000_000
    assert told["plan"]["choice"]["placement"] == "three_stage"
    assert sum(told["plan"]["num_gpus"].values()) == pytest.approx(1)


def test_where_nothing_fits_the_status_is_1_and_nothing_is_written(walk: Walk, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    assert plan.main(["org/m", "--gpu", "2GB", "--write", str(file)]) == 1
    assert not file.exists()


def test_a_model_that_cannot_be_looked_at_is_told(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    walk.measured = Measured("m", problem="m has no model_index.json")
    assert plan.main(["org/m", "--gpu", "H100"]) == 1
    assert capsys.readouterr().err == "org/m cannot be planned for: m has no model_index.json\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("org/m", "required: --gpu"),
        ("org/m --gpu 24", "gpu '24' must be a size such as 24GB, or one of "),
        ("org/m --gpu H100 --gpus 0", "must be a whole number from 1, got '0'"),
        ("org/m --gpu H100 --gpus 65", "must be from 1 to 64, got '65'"),
        ("org/m --gpu H100 --size 1024", "must be like 512x512, got '1024'"),
        ("org/m --gpu H100 --num-frames -1", "must be a whole number from 1, got '-1'"),
        ("org/m --gpu H100 --precision fp9", "invalid choice: 'fp9'"),
    ],
)
def test_a_wrong_command_is_told_what_is_allowed(
    arguments: str, told: str, walk: Walk, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(arguments.split())
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_plan_for_gguf_cannot_be_written(walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["org/m", "--gpu", "24GB", "--precision", "gguf_q4"]
    assert plan.main(asked) == 0
    assert plan.main([*asked, "--write", str(tmp_path / "serve.yaml")]) == 2
    assert "write its address at `precision:`" in capsys.readouterr().err


def test_without_a_model_the_status_is_2(walk: Walk, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--gpu", "H100"]) == 2
    assert "name a MODEL, or a Serve config with --config FILE" in capsys.readouterr().err


# --- the config that is written ---


def written(walk: Walk, folder: Path, measured: Measured, *arguments: str) -> Any:
    walk.measured = measured
    file = folder / "serve.yaml"
    assert plan.main(["org/m", "--dtype", "bfloat16", *arguments, "--write", str(file)]) == 0
    assert check_config.check_config(file) == []
    assert file.read_text().startswith("# ")
    return yaml.safe_load(file.read_text())["applications"][0]


def test_the_written_config_is_one_that_check_config_accepts(walk: Walk, tmp_path: Path) -> None:
    application = written(walk, tmp_path, FLUX, "--gpu", "H100")
    assert application["args"] == {
        "model": "org/m",
        "dtype": "bfloat16",
        "placement": "three_stage",
        "denoising": {"max_batch_size": 4},
        "default_arguments": {"width": 1024, "height": 1024},
        "limits": {"max_pixels": 1024 * 1024},
    }
    shares = {each["name"]: each["ray_actor_options"]["num_gpus"] for each in application["deployments"]}
    assert set(shares) == {"Encoder", "Denoiser", "VAE"}
    assert sum(shares.values()) == pytest.approx(1)
    assert "autoscaling_policy" not in application


def test_several_cards_are_scaled_over(walk: Walk, tmp_path: Path) -> None:
    application = written(walk, tmp_path, wan(), "--gpu", "H100", "--gpus", "8")
    most = {each["name"]: each["autoscaling_config"]["max_replicas"] for each in application["deployments"]}
    assert most == {"Encoder": 1, "Denoiser": 7, "VAE": 1}  # the eighth card is the encoder's and the VAE's
    assert application["args"]["default_arguments"] == {"width": 1280, "height": 720, "num_frames": 81}
    assert application["args"]["limits"] == {"max_pixels": 1280 * 720, "max_frames": 81}


def test_a_config_is_planned_with_its_own_args_and_keeps_them(walk: Walk, tmp_path: Path) -> None:
    first = written(walk, tmp_path, FLUX, "--gpu", "H100")
    first["args"] |= {"model_name": "mine", "component_dtypes": {"vae": "float32"}, "limits": {"max_steps": 7}}
    file, again = tmp_path / "own.yaml", tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [first]}))
    assert plan.main(["--config", str(file), "--gpu", "H100", "--write", str(again)]) == 0
    assert walk.orders[-1].model.component_dtypes == {"vae": "float32"}
    args = yaml.safe_load(again.read_text())["applications"][0]["args"]
    assert (args["model_name"], args["component_dtypes"]) == ("mine", {"vae": "float32"})
    assert args["limits"] == {"max_steps": 7, "max_pixels": 1024 * 1024}


# --- what a config needs as it is ---


def test_a_config_as_it_is_is_told_beside_the_plan(
    walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--config", str(config(tmp_path, ONE_CARD)), "--gpu", "H100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("the config as it is:") + 1 :] == [
        "Weights in GB: transformer 23.8, text_encoder 0.2, text_encoder_2 9.5, vae 0.2.",
        "Activations of one request of 1024x1024 in GB: encoder 0.1, denoiser 0.5, vae 1.6.",
        "H100: 37.4 of 85.5 GB (Encoder 10.4, Denoiser 24.8, VAE 2.2), 40.9 with 8 requests merged.",
    ]


def test_precision_and_offload_of_a_config_count(walk: Walk, tmp_path: Path) -> None:
    args = AppArgs(model="m", precision="fp8", offload={"text_encoder_2": "group"})
    assert fits.levers_of(args, FLUX) == Levers({"transformer": "fp8"}, frozenset({"text_encoder_2"}))
    named = AppArgs(model="m", precision={"transformer": "o/r/flux1-Q8_0.gguf", "text_encoder_2": "int8"})
    assert fits.levers_of(named, FLUX).precision == {"transformer": "gguf_q8", "text_encoder_2": "int8"}


@pytest.mark.parametrize("measured", [FLUX, wan()], ids=["flux", "wan"])
@pytest.mark.parametrize("gpu", ["L4", "3090", "A100-40", "32GB"])
def test_a_config_of_whatever_is_chosen_is_accepted(measured: Measured, gpu: str, walk: Walk, tmp_path: Path) -> None:
    written(walk, tmp_path, measured, "--gpu", gpu, "--gpus", "2")


# --- warnings of check_config ---


def config(folder: Path, shares: dict[str, float], **options: Any) -> Path:
    """Of a checkpoint that is in a folder here."""
    (folder / "model").mkdir()
    application = {
        "name": "a",
        "import_path": "serve_app.app:build_app",
        "args": {"model": str(folder / "model")},
        "deployments": [
            {"name": name, "ray_actor_options": {"num_gpus": share, **options}} for name, share in shares.items()
        ],
    }
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    return file


ONE_CARD = {"Encoder": 0.2, "Denoiser": 0.7, "VAE": 0.1}


def warned(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert check_config.main(list(arguments)) == 0
    return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]


def test_what_does_not_fit_is_a_warning_and_no_problem(
    walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(config(tmp_path, ONE_CARD))
    [warning] = warned(capsys, file, "--gpu", "24GB")
    assert "model in three_stage needs 37.4 GB on one card, at 1024x1024 and one request at a time" in warning
    assert "24GB has 24.0 GB, of which 23.3 GB can be counted on" in warning
    assert warned(capsys, file, "--gpu", "L40S") == []


def test_the_card_that_a_deployment_asks_for_is_taken(
    walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(warned(capsys, str(config(tmp_path, ONE_CARD, accelerator_type="L4")))) == 1


def test_processes_are_put_on_cards_as_ray_puts_them(
    walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walk.measured = wan()
    file = str(config(tmp_path, {"Encoder": 0.25, "Denoiser": 1, "VAE": 0.75}))
    assert warned(capsys, file, "--gpu", "H100") == []
    [warning] = warned(capsys, file, "--gpu", "L40S")
    assert "needs 66.4 GB on one card" in warning


def test_without_a_card_or_a_folder_nothing_is_looked_at(
    walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config(tmp_path, ONE_CARD)
    assert warned(capsys, str(file)) == []
    file.write_text(file.read_text().replace(str(tmp_path / "model"), "org/model"))
    assert warned(capsys, str(file), "--gpu", "2GB") == []
    assert walk.orders == []


def test_what_cannot_be_measured_is_told_so(walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walk.measured = replace(FLUX, problem="it has no scheduler")
    [warning] = warned(capsys, str(config(tmp_path, ONE_CARD)), "--gpu", "H100")
    assert "it cannot be told whether model fits: it has no scheduler" in warning


def test_a_pipeline_without_sizes_is_written_without_them(walk: Walk, tmp_path: Path) -> None:
    small = Measured("m", "P", {"image": "a picture"}, 64, 64, 1, (component("unet", 1, "denoiser"),), calls(0, 0.1, 0))
    assert "default_arguments" not in written(walk, tmp_path, small, "--gpu", "H100")["args"]
