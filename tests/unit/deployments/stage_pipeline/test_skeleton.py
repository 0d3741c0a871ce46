"""A skeleton tells a pipeline all that the real component would, and holds none of its weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from deployments.stage_pipeline.shapes import output_description
from deployments.stage_pipeline.skeleton import skeleton
from deployments.tensors.values import MissingTensor
from tests.support.tiny_models.autoencoders import kl_autoencoder

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    kl_autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_encoder")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return folder


def settings(model: Any) -> dict[str, Any]:
    """Its configuration, but for where it was read and the dtype of the file."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "dtype")}


CASES = [(AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "fixture"), CASES)
def test_a_skeleton_has_the_names_shapes_and_dtypes_of_the_real_one_and_no_bytes(
    cls: Any, fixture: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(fixture)
    real = cls.from_pretrained(folder, torch_dtype=dtype)
    bones = skeleton(cls, folder, DEVICE, dtype)
    assert isinstance(bones, cls)
    assert type(bones).__name__ == cls.__name__
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(bones, kind)()), dict(getattr(real, kind)())
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert all(torch.equal(buffer, real.get_buffer(name)) for name, buffer in bones.named_buffers())
    assert all(parameter.is_meta for parameter in bones.parameters())
    assert (bones.dtype, bones.device, bones.training) == (real.dtype, DEVICE, False)
    assert settings(bones) == settings(real)


class Scaled(torch.nn.Module):
    """Its numbers are known when the model that it is in gives its weights their first values."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2))
        self.register_buffer("scale", torch.full((2,), torch.nan), persistent=False)


class WithScales(PreTrainedModel):
    config_class = CLIPTextConfig
    base_model_prefix = "model"

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__(config)
        self.own, self.parents = Scaled(), Scaled()
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        for scaled in {Scaled: [module], WithScales: [self.parents]}.get(type(module), []):
            torch.nn.init.ones_(scaled.weight)
            torch.nn.init.constant_(scaled.scale, 2)


def test_a_skeleton_has_the_buffers_that_a_model_fills_with_its_first_weights(tmp_path: Path) -> None:
    WithScales(CLIPTextConfig()).save_pretrained(tmp_path)
    bones = skeleton(WithScales, tmp_path, DEVICE, torch.float32)
    assert (bones.own.scale.tolist(), bones.parents.scale.tolist()) == ([2, 2], [2, 2])
    assert bones.own.weight.is_meta


def test_a_skeleton_is_moved_nowhere_and_its_dtype_can_be_changed(vae: Path) -> None:
    bones = skeleton(AutoencoderKL, vae, torch.device("cpu"), torch.float32)
    assert bones.to("cuda") is bones
    assert bones.cuda() is bones.cpu() is bones
    assert bones.device == torch.device("cpu")
    bones.to(torch.bfloat16)
    assert bones.dtype == torch.bfloat16
    assert all(parameter.is_meta for parameter in bones.parameters())


def test_the_shape_of_a_decoded_picture_is_known_without_weights(vae: Path) -> None:
    bones = skeleton(AutoencoderKL, vae, DEVICE, torch.float32)
    latents = torch.zeros(1, bones.config.latent_channels, 4, 4)
    real = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        expected = real.decode(latents).sample.shape

    stage: Any = SimpleNamespace(decoder_shapes={})
    for _ in range(2):  # the second is remembered
        (described,) = output_description(stage, bones, "vae", "decode", (latents,), {"return_dict": False})
        assert described == MissingTensor(tuple(expected), torch.float32, described.on_stage_device)
    assert len(stage.decoder_shapes) == 1


def test_switches_that_were_set_at_run_time_are_seen_by_the_twin(vae: Path) -> None:
    bones = skeleton(AutoencoderKL, vae, DEVICE, torch.float32)
    bones.enable_tiling()
    assert not bones.meta_twin(False).use_tiling
    assert bones.meta_twin(True).use_tiling
    assert bones.meta_twin(False) is bones.meta_twin(True)
