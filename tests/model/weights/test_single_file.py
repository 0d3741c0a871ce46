"""A checkpoint in one file is read with the settings of a folder, or refused with what to do."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from deployments.errors import CheckpointError
from deployments.stage_pipeline.roles import read_layout
from deployments.weights.load import load_component
from deployments.weights.locate import resolve_checkpoint
from tests.support.further import further
from tests.support.original_names import single_file
from tests.support.tiny_models.random_weights import diffusers_model_like, transformers_model
from tests.support.tiny_models.stable_diffusion import sd15, sdxl
from tests.support.tiny_models.text_encoders import clip_text_config


@pytest.fixture
def single(flux_checkpoint: Path, tmp_path: Path) -> Path:
    """The transformer alone in one file, as FLUX checkpoints are often published; other numbers than the folder's."""
    tensors = load_file(next((flux_checkpoint / "transformer").glob("*.safetensors")))
    file = tmp_path / "flux-tuned.safetensors"
    save_file({name: tensor.to(torch.bfloat16) * 2 for name, tensor in tensors.items()}, file)
    return file


@pytest.mark.filterwarnings("ignore")
def test_a_single_file_is_unpacked_once_beside_the_settings_of_a_folder(single, flux_checkpoint, tmp_path):
    folder = resolve_checkpoint(str(single), tmp_path / "cache", config_folder=str(flux_checkpoint))
    loaded = load_component(FluxTransformer2DModel, folder / "transformer", None, "cpu", use_streamer=True)
    expected = load_file(single)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.to(torch.bfloat16), expected[name]), name
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        here, there = ({p.name: p.read_bytes() for p in (root / part).iterdir()} for root in (folder, flux_checkpoint))
        assert here == there
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        path.name for path in flux_checkpoint.iterdir() if path.is_dir()
    }
    before = folder.stat().st_mtime_ns
    assert resolve_checkpoint(str(single), tmp_path / "cache", config_folder=str(flux_checkpoint)) == folder
    assert folder.stat().st_mtime_ns == before


def wide_sdxl() -> Any:
    """The two text encoders have different widths, as in published ones: by these they are told apart in a file."""
    pipeline, _ = sdxl()
    config = clip_text_config()
    config.hidden_size = 48
    pipeline.text_encoder_2 = transformers_model(CLIPTextModelWithProjection, config, seed=11)
    pipeline.unet = diffusers_model_like(pipeline.unet, cross_attention_dim=80)
    return pipeline


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [lambda: sd15()[0], further(wide_sdxl)], ids=["sd15", "sdxl"])
def test_a_file_with_the_names_of_the_first_stable_diffusion_holds_the_whole_pipeline(build: Any, tmp_path: Path):
    pipeline = build()
    pipeline.save_pretrained(tmp_path / "settings")
    for weights in (tmp_path / "settings").rglob("*.safetensors"):
        weights.unlink()
    save_file(single_file(pipeline), tmp_path / "dreams.safetensors")
    folder = resolve_checkpoint(
        str(tmp_path / "dreams.safetensors"), tmp_path / "cache", config_folder=str(tmp_path / "settings")
    )
    layout = read_layout(folder)
    assert set(layout.models) == {n for n, c in pipeline.components.items() if isinstance(c, torch.nn.Module)}
    for name, cls in layout.models.items():
        found, expected = (
            load_component(cls, folder / name, None, "cpu", use_streamer=True).state_dict(),
            getattr(pipeline, name).state_dict(),
        )
        assert found.keys() == expected.keys(), name
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), (name, key)


def test_a_single_file_that_cannot_be_read_is_refused_with_the_remedy(single, flux_checkpoint, tmp_path):
    def refused(model: Path, config_folder: Path | None, sentence: str) -> None:
        with pytest.raises(CheckpointError, match=sentence) as refusal:
            resolve_checkpoint(str(model), tmp_path / "cache", config_folder=config_folder and str(config_folder))
        assert str(model) in str(refusal.value) or str(config_folder) in str(refusal.value)

    refused(single, None, "is a single file.*name the folder .*`config_folder:` in the `args`")
    refused(single, tmp_path / "nowhere", r"has no model_index\.json")
    refused(flux_checkpoint, flux_checkpoint, "config_folder is for a single file")
    refused(Path(shutil.copy(single, tmp_path / "a.ckpt")), flux_checkpoint, r"is no \.safetensors file")
    os.truncate(single, 1000)
    refused(single, flux_checkpoint, "its header|is not a safetensors file")
    single.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(single, flux_checkpoint, "git lfs pull")
    assert not list((tmp_path / "cache").rglob("model_index.json"))
