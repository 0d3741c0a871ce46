"""Tiny LoRA files for any tiny model whose pipeline class loads some, as its `save_lora_weights` writes them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from safetensors.torch import load_file

from tests.support.tiny_models.checkpoints import load_unsplit

Scale = float | dict[str, float]
ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "to_query",
    "to_key",
    "to_value",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "qkv",
    "wo",
)
# Diffusers' loader knows no others in a text encoder.
IN_TEXT_ENCODERS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class TinyLora:
    """Random numbers for the layers of one kind, none of them zero.

    `of_all_layers`: every linear layer and every convolution of the denoisers, not those of the attention alone.
    """

    name: str
    seed: int
    rank: int
    alpha: float
    of_all_layers: bool = False
    in_text_encoders: bool = True


A = TinyLora("a", 1, rank=2, alpha=1.0)
B = TinyLora("b", 2, rank=4, alpha=6.0, of_all_layers=True)
C = TinyLora("c", 3, rank=3, alpha=3.0, in_text_encoders=False)
TINY_LORAS = (A, B, C)


def loadable_parts(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The components for which a file may have weights, by name; none where the class loads no LoRAs."""
    if not isinstance(pipeline, LoraBaseMixin):
        return {}
    names = [name for name in pipeline._lora_loadable_modules if getattr(pipeline, name, None) is not None]
    parts = {name: getattr(pipeline, name) for name in names}
    return parts if any(not is_text_encoder(name) for name in parts) else {}


def is_text_encoder(name: str) -> bool:
    return name.startswith("text_encoder")


@dataclass(frozen=True)
class LoraFile:
    """`component`: the one that the loader must be told to load it into; None: where it puts it itself."""

    path: Path
    component: str | None = None

    @property
    def name(self) -> str:
        return self.path.stem


def write_lora(pipeline: Any, lora: TinyLora, folder: Path) -> tuple[LoraFile, ...]:
    """Its file, and one more for a second expert, as they are published: both have the names of the first's layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        layers = {name: _layers(name, part, lora) for name, part in loadable_parts(pipeline).items()}
    told = [name for name, weights in layers.items() if weights and _must_be_told(pipeline, name)]
    own = {name: weights for name, weights in layers.items() if weights and name not in told}
    files = [LoraFile(_written(pipeline, lora, folder, lora.name, own, {name: name for name in own}))]
    for name in told:
        path = _written(
            pipeline,
            lora,
            folder,
            f"{lora.name}-{name}",
            {pipeline.transformer_name: layers[name]},
            {pipeline.transformer_name: name},
        )
        files.append(LoraFile(path, name))
    return tuple(files)


def write_lora_of_all_experts(pipeline: Any, lora: TinyLora, folder: Path) -> LoraFile:
    """The numbers of `write_lora` in one file, each expert's under the name of its component."""
    layers: dict[str, Any] = {}
    parts = {}
    for file in write_lora(pipeline, lora, folder / "parts"):
        prefix = file.component or pipeline.transformer_name
        for key, tensor in load_file(file.path).items():
            layers.setdefault(prefix, {})[key.removeprefix(f"{pipeline.transformer_name}.")] = tensor
        parts[prefix] = prefix
    return LoraFile(_written(pipeline, lora, folder, lora.name, layers, parts))


def _written(
    pipeline: Any, lora: TinyLora, folder: Path, name: str, layers: dict[str, Any], parts: dict[str, str]
) -> Path:
    """`parts`: the component that each prefix of names stands for."""
    targets = {prefix: _targets(part, getattr(pipeline, part), lora) for prefix, part in parts.items()}
    metadata = {prefix: _metadata(lora, found) for prefix, found in targets.items()}
    file = f"{name}.safetensors"
    type(pipeline)._save_lora_weights(folder, layers, metadata, weight_name=file)
    return folder / file


def _must_be_told(pipeline: Any, name: str) -> bool:
    return f'"load_into_{name}"' in inspect.getsource(type(pipeline).load_lora_weights)


def _targets(name: str, part: torch.nn.Module, lora: TinyLora) -> list[str]:
    """The layers of one component that the file changes."""
    if is_text_encoder(name):
        return _linear(part, IN_TEXT_ENCODERS) if lora.in_text_encoders else []
    if lora.of_all_layers:
        return [each for each, layer in part.named_modules() if _is_linear(layer)]
    return _linear(part, ATTENTION)


def _is_linear(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear) or (isinstance(layer, torch.nn.Conv2d) and layer.groups == 1)


def _linear(part: torch.nn.Module, ends: Sequence[str]) -> list[str]:
    wanted = tuple(f".{end}" for end in ends)
    return [n for n, layer in part.named_modules() if isinstance(layer, torch.nn.Linear) and n.endswith(wanted)]


def _layers(name: str, part: torch.nn.Module, lora: TinyLora) -> dict[str, torch.Tensor]:
    """The matrices by PEFT's names; those of text encoders and of a U-Net's attention as diffusers has named them."""
    weights = {}
    for target in _targets(name, part, lora):
        layer: Any = part.get_submodule(target)
        down, up = _shapes(layer, lora.rank)
        weights[f"{target}.lora_A.weight"] = torch.randn(down) / down[1] ** 0.5
        weights[f"{target}.lora_B.weight"] = 0.2 * torch.randn(up)
    if (name == "unet" and not lora.of_all_layers) or is_text_encoder(name):
        return dict(convert_state_dict_to_diffusers(weights)) if weights else {}
    return weights


def _shapes(layer: torch.nn.Linear | torch.nn.Conv2d, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(layer, torch.nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)


def _metadata(lora: TinyLora, targets: list[str]) -> dict[str, Any]:
    """As diffusers' training scripts hand it to `save_lora_weights`."""
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets).to_dict()  # type: ignore[arg-type]


def unsplit_with_loras(folder: Path, files: Sequence[tuple[LoraFile, Scale]]) -> Any:
    """Diffusers' own way, the truth: the whole pipeline with these files loaded and set."""
    pipeline = load_unsplit(folder)
    for file, _ in files:
        told = {} if file.component is None else {f"load_into_{file.component}": True}
        place, name = str(file.path.parent), file.path.name
        pipeline.load_lora_weights(place, weight_name=name, adapter_name=file.name, **told)
    if files:
        # Diffusers empties the mappings, so that one object cannot stand for two.
        pipeline.set_adapters([file.name for file, _ in files], [copy.copy(scale) for _, scale in files])
    return pipeline
