"""Files of LoRAs for tiny models: random layers for modules of a model, in diffusers' or kohya's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deployments.adapters.use import AdapterUse

Tensors = dict[str, torch.Tensor]


def lora_tensors(model: Any, prefix: str, ends: tuple[str, ...], rank: int = 2, seed: int = 0) -> Tensors:
    """Of a model's linear layers whose names end so, under the prefix of their component."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and path.endswith(ends):
            name = f"{prefix}.{path}" if prefix else path
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=generator) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=generator) * 0.2
    assert tensors, f"no layer of {type(model).__name__} ends with {ends}"
    return tensors


def kohya_tensors(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], alpha: float) -> Tensors:
    """The same layers as sd-scripts writes them, with alphas; `names`: prefix of a component -> kohya's."""
    renamed = {}
    for key, tensor in tensors.items():
        path, _, factor = key.rpartition(".lora_")
        prefix, _, inside = path.replace(".text_model.", ".").partition(".")
        name = f"{names[prefix]}_{inside.replace('.', '_')}"
        renamed[f"{name}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = tensor
        renamed[f"{name}.alpha"] = torch.tensor(alpha)
    return renamed


def written(folder: Path, name: str, tensors: Mapping[str, torch.Tensor], **more: Any) -> AdapterUse:
    """Writes the file, and says of it what a request would."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file(dict(tensors), path, metadata={"format": "pt"})
    return AdapterUse(name, str(path), **more)


def adapter_state(model: Any, name: str) -> dict[str, Any]:
    """What the layers of an adapter are: numbers, how they are scaled, whether they ask for gradients."""
    state: dict[str, Any] = {
        path.replace(f".{name}.", "."): parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for path, parameter in model.named_parameters()
        if f".{name}." in path
    }
    for path, layer in model.named_modules():
        if name in getattr(layer, "scaling", {}):
            state[f"{path} scaling"] = torch.tensor(float(layer.scaling[name]), dtype=torch.float64)
    return state


def assert_same_state(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for path, tensor in expected.items():
        assert (found[path].dtype, found[path].requires_grad) == (tensor.dtype, tensor.requires_grad), path
        assert torch.equal(found[path], tensor), path
