"""Two models that have encoders and VAE in common, on a real Ray: one process of each for both, and the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tests.support.served_application import ROOT, ServedApplication, application

pytestmark = pytest.mark.timeout(1800)

BASE = ROOT / "checkpoints" / "emoji-flux"
SHARED = ("Encoder-base+tuned", "VAE-base+tuned")
ALONE = {"base": "base-alone", "tuned": "tuned-alone"}  # the same checkpoint, with no stage in common with anybody


def test_models_with_one_encoder_and_one_vae_make_the_pictures_that_they_make_alone(
    served: ServedApplication, tmp_path: Path
) -> None:
    app = two_models(tuned_checkpoint(tmp_path / "tuned"), served.folder)
    with served.beside(app):
        served.wait_until_healthy("/shared")
        stages = served.health("/shared").json()["stages"]
        for name in SHARED:
            weights = stages[name]["weight_bytes"]
            assert stages[name]["shared"]
            assert all(place.startswith("base.") for place in weights), "what tuned needs is there once, for both"
            memory = served.process_of(name, "shared").memory_full_info()
            print(f"{name}: weights {sum(weights.values())} bytes for both; the process: {memory.uss / 1e6:.0f} MB")
        pictures = {model: picture(served, model) for pair in ALONE.items() for model in pair}
        for model, alone in ALONE.items():
            assert pictures[model] == pictures[alone]
        assert pictures["base"] != pictures["tuned"]
        assert picture(served, "base") == pictures["base"]


def picture(served: ServedApplication, model: str) -> str:
    asked = {"prompt": "a red heart", "seed": 3, "deterministic": True, "num_inference_steps": 4}
    [made] = served.pictures("/shared", model=model, **asked)
    return str(made["b64_json"])


def two_models(tuned: Path, folder: Path) -> dict[str, Any]:
    defaults = {"default_arguments": {"height": 128, "width": 128}}
    models = {
        "base": {"model": str(BASE), **defaults},
        "tuned": {"model": str(tuned), **defaults},
        "base-alone": {"model": str(BASE), "placement": "one_stage", **defaults},
        "tuned-alone": {"model": str(tuned), "placement": "one_stage", **defaults},
    }
    deployments = (*SHARED, "Denoiser-base", "Denoiser-tuned", "Pipeline-base-alone", "Pipeline-tuned-alone")
    app = application("shared", BASE, deployments, folder)
    app["args"] = {"models": models, "share": "auto", "output_directory": str(folder / "shared")}
    return app


def tuned_checkpoint(folder: Path) -> Path:
    """Files of their own, of which only the denoiser has other numbers."""
    shutil.copytree(BASE, folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("proj_out.weight"):
                tensors[name] = tensor * 1.25
        save_file(tensors, file, {"format": "pt"})
    return folder
