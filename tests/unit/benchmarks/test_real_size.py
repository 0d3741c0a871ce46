"""The random checkpoints have the size of the published models, and diffusers loads and runs them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

from benchmarks.real_size import FLUX1_DEV, REAL_SIZES, on_meta, write_checkpoint
from tests.support.tiny_models import flux


@pytest.mark.parametrize(
    ("model", "component", "billions"),
    [
        ("flux1-dev", "transformer", 11.90),
        ("flux1-dev", "text_encoder", 0.12),
        ("flux1-dev", "text_encoder_2", 4.76),
        ("flux1-dev", "vae", 0.08),
        ("wan2.1-1.3b", "transformer", 1.42),
        ("wan2.1-1.3b", "text_encoder", 5.68),
        ("wan2.1-1.3b", "vae", 0.13),
    ],
)
def test_a_component_has_as_many_parameters_as_the_published_one(model: str, component: str, billions: float) -> None:
    made = on_meta(REAL_SIZES[model].models[component])
    assert sum(p.numel() for p in made.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_written_checkpoint_loads_and_makes_a_picture(tmp_path: Path) -> None:
    tiny, arguments = flux.flux()
    models = {name: lambda name=name: make_like(getattr(tiny, name)) for name in FLUX1_DEV.models}
    write_checkpoint(replace(FLUX1_DEV, models=models), tmp_path, shard_bytes=50_000)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(pipeline.transformer, FluxTransformer2DModel)
    picture = pipeline(**arguments, output_type="pt").images
    assert torch.isfinite(picture).all()


def make_like(component: torch.nn.Module) -> torch.nn.Module:
    if hasattr(component, "from_config"):
        return type(component).from_config(component.config)  # type: ignore[no-any-return]
    return type(component)(component.config)
