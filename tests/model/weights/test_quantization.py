"""A quantised component is read by the row of QUANTIZERS that its configuration names, with no other change."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from safetensors.torch import load_file, save_file

from deployments.errors import CheckpointError
from deployments.weights.load import load_component
from deployments.weights.quantization import table
from deployments.weights.quantization.convert_to_nvfp4 import convert_transformer
from deployments.weights.quantization.nvfp4 import NVFP4Linear
from deployments.weights.quantization.table import QUANTIZERS, Quantizer
from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.flux import flux


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers as it comes, whatever was registered before; its default dtype after a failure too."""
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        for method in ("nvfp4", "negated"):
            monkeypatch.delitem(mapping, method, raising=False)
    yield
    torch.set_default_dtype(torch.float32)
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        mapping.pop("negated", None)


def say_quantised(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))


@pytest.fixture
def negated(tmp_path: Path) -> tuple[Path, AutoencoderKL]:
    """An autoencoder's folder whose weights are stored with the other sign, and the autoencoder as it was."""
    model = kl_autoencoder()
    model.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    say_quantised(tmp_path / "vae", "negated")
    return tmp_path / "vae", model


class Method(StrEnum):
    NEGATED = "negated"


class NegatedConfig(QuantizationConfigMixin):
    def __init__(self, **_: Any) -> None:
        self.quant_method = Method.NEGATED

    def __repr__(self) -> str:
        return "NegatedConfig()"


class Negated(DiffusersQuantizer):
    is_serializable = True
    is_trainable = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        pass

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for parameter in model.parameters():
            parameter.data = -parameter.data
        return model


def register_negated() -> None:
    auto.AUTO_QUANTIZER_MAPPING["negated"] = Negated
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["negated"] = NegatedConfig


@pytest.mark.parametrize("use_streamer", [True, False])
def test_a_planted_row_loads_the_components_that_name_it(negated, monkeypatch, use_streamer):
    folder, model = negated
    monkeypatch.setattr(table, "QUANTIZERS", (*QUANTIZERS, Quantizer("negated", register_negated)))
    loaded = load_component(AutoencoderKL, folder, torch.float32, "cpu", use_streamer)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_method_without_a_row_is_refused_by_the_library_with_the_folder(negated):
    folder, _ = negated
    with pytest.raises(CheckpointError, match=r"vae cannot be loaded: Unknown quantization type, got negated"):
        load_component(AutoencoderKL, folder, torch.float32, "cpu", use_streamer=False)


def test_a_row_whose_library_is_missing_is_refused_with_its_name(negated, monkeypatch):
    def register() -> None:
        raise ImportError("no module named negation: pip install negation")

    monkeypatch.setattr(table, "QUANTIZERS", (Quantizer("negated", register),))
    with pytest.raises(CheckpointError, match=r"AutoencoderKL in .*vae cannot be loaded: .*pip install negation"):
        load_component(AutoencoderKL, negated[0], torch.float32, "cpu", use_streamer=False)


def test_nvfp4_weights_are_loaded_without_any_acceleration(tmp_path):
    flux()[0].transformer.save_pretrained(tmp_path / "transformer")
    num_layers = convert_transformer(tmp_path / "transformer")
    loaded = load_component(FluxTransformer2DModel, tmp_path / "transformer", torch.bfloat16, "cpu", use_streamer=True)
    assert sum(isinstance(module, NVFP4Linear) for module in loaded.modules()) == num_layers > 20
