"""Two models that have encoders and VAE in common, on a real Ray: one process of each for both, and the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tests.support.served_application import DEFAULT_ARGUMENTS, ServedApplication, application, picture_of
from tests.support.unsplit import unsplit_picture

pytestmark = pytest.mark.timeout(1800)

SHARED = ("Encoder-base+tuned", "VAE-base+tuned")
PROMPT = "a small cat"
SEED = 3


def test_models_with_one_encoder_and_one_vae_make_the_pictures_of_their_own_pipelines(
    served: ServedApplication, flux_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoints = {"base": flux_checkpoint, "tuned": tuned_checkpoint(flux_checkpoint, tmp_path)}
    with served.beside(two_models(checkpoints, served.folder)):
        served.wait_until_healthy("/shared")
        stages = served.health("/shared").json()["stages"]
        assert set(stages) == {*SHARED, "Denoiser-base", "Denoiser-tuned"}
        for name in SHARED:
            weights = stages[name]["weight_bytes"]
            assert stages[name]["shared"]
            assert all(place.startswith("base.") for place in weights), "what tuned needs is there once, for both"
            memory = served.process_of(name, "shared").memory_full_info()
            print(f"{name}: weights {sum(weights.values())} bytes for both; the process: {memory.uss / 1e6:.0f} MB")
        made = {model: picture(served, model) for model in ("tuned", "base", "tuned")}
        for model, folder in checkpoints.items():
            assert made[model].tobytes() == unsplit_picture(folder, SEED, prompt=PROMPT).tobytes()
        assert made["base"].tobytes() != made["tuned"].tobytes()


def picture(served: ServedApplication, model: str) -> Any:
    [made] = served.pictures("/shared", model=model, prompt=PROMPT, seed=SEED, deterministic=True)
    return picture_of(made)


def two_models(checkpoints: dict[str, Path], folder: Path) -> dict[str, Any]:
    app = application("shared", checkpoints["base"], (*SHARED, "Denoiser-base", "Denoiser-tuned"), folder)
    models = {name: {"model": str(each), "default_arguments": DEFAULT_ARGUMENTS} for name, each in checkpoints.items()}
    app["args"] = {"models": models, "share": "auto", "output_directory": str(folder / "shared")}
    return app


def tuned_checkpoint(base: Path, folder: Path) -> Path:
    """Files of their own, of which only the denoiser has other numbers."""
    tuned = folder / base.name
    shutil.copytree(base, tuned)
    [file] = (tuned / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.weight"] = tensors["proj_out.weight"] * 1.25
    save_file(tensors, file, {"format": "pt"})
    return tuned
