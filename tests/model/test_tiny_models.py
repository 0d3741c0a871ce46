"""The tiny checkpoints are what they claim: whole, reproducible, and sensitive to what is asked."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

from tests.support.tiny_models import TINY_MODELS, TinyModel, checkpoint, request_arguments, run_unsplit
from tests.support.tiny_models.__main__ import main
from tests.support.tiny_models.checkpoints import call

COMPARED = ("flux", "ltx2", "wan21_i2v")  # a picture, a video with sound, a video from a picture


@pytest.mark.rest
@pytest.mark.parametrize("name", COMPARED)
def test_a_reloaded_checkpoint_gives_the_same_bytes_as_the_pipeline_in_memory(
    name: str, checkpoints_root: Path
) -> None:
    pipeline, request = TINY_MODELS[name].build()
    pipeline.set_progress_bar_config(disable=True)
    in_memory = call(pipeline, request, seed=0)
    reloaded = run_unsplit(checkpoint(name, checkpoints_root), request_arguments(name), seed=0)
    assert len(in_memory) == (2 if name == "ltx2" else 1)
    assert len(in_memory) == len(reloaded)
    assert all(torch.equal(*pair) for pair in zip(in_memory, reloaded, strict=True))


@pytest.mark.rest
@pytest.mark.parametrize("name", COMPARED)
def test_the_output_depends_on_prompt_and_seed_and_is_no_constant(name: str, checkpoints_root: Path) -> None:
    folder = checkpoint(name, checkpoints_root)
    request = request_arguments(name)
    output = run_unsplit(folder, request, seed=0)[0]
    assert torch.isfinite(output).all()
    assert output.std() > 0.01
    assert not torch.equal(output, run_unsplit(folder, request | {"prompt": "a red sun"}, seed=0)[0])
    assert not torch.equal(output, run_unsplit(folder, request, seed=1)[0])


def test_when_another_process_finishes_first_its_folder_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = tmp_path / "zimage"

    def let_the_other_process_win(folder: Path, pipeline: DiffusionPipeline) -> None:
        shutil.copytree(folder, winner)
        (winner / "winner").touch()

    model = TinyModel("zimage", TINY_MODELS["zimage"].build, after_save=let_the_other_process_win)
    monkeypatch.setitem(TINY_MODELS, "zimage", model)
    assert checkpoint("zimage", tmp_path) == winner
    assert (winner / "winner").exists()
    assert list(tmp_path.iterdir()) == [winner]


def test_a_failed_build_leaves_no_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, pipeline: DiffusionPipeline) -> None:
        raise OSError("disk full")

    model = TinyModel("zimage", TINY_MODELS["zimage"].build, after_save=fail)
    monkeypatch.setitem(TINY_MODELS, "zimage", model)
    with pytest.raises(OSError, match="disk full"):
        checkpoint("zimage", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.rest
def test_an_adapter_is_loaded_only_into_the_components_that_are_real(checkpoints_root: Path) -> None:
    folder = checkpoint("flux_lora", checkpoints_root)
    with torch.device("meta"):
        config: Any = FluxTransformer2DModel.load_config(folder / "transformer")
        skeleton = FluxTransformer2DModel.from_config(config)
    pipeline = DiffusionPipeline.from_pretrained(folder, transformer=skeleton, vae=None, text_encoder_2=None)
    TINY_MODELS["flux_lora"].after_load(pipeline)
    assert pipeline.text_encoder.active_adapters() == ["tiny"]
    assert not any("lora" in name for name, _ in pipeline.transformer.named_parameters())


@pytest.mark.rest
def test_an_adapter_changes_the_picture(checkpoints_root: Path) -> None:
    request = request_arguments("flux")
    plain = run_unsplit(checkpoint("flux", checkpoints_root), request, seed=0)[0]
    adapted = run_unsplit(checkpoint("flux_lora", checkpoints_root), request, seed=0)[0]
    assert (plain - adapted).abs().max() > 1e-3


def test_the_command_builds_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path), "zimage", "sana"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["zimage", "sana"]
    assert sorted(path.parent.name for path in tmp_path.glob("*/model_index.json")) == ["sana", "zimage"]


def test_an_unknown_name_is_refused_with_the_names_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "flux9"])
    message = capsys.readouterr().err
    assert "no tiny model is called flux9" in message
    assert "zimage" in message
