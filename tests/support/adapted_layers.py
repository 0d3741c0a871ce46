"""A few layers with adapters in them: as PEFT computes them, and as a forward of ours does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from deployments.adapters.forward import applied

Inputs = Callable[[int], torch.Tensor]


CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 2, "lora_alpha": 3},
    "b": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "c": {"r": 3, "rank_pattern": {"0": 2}, "alpha_pattern": {"0": 7}},
}


LONE: list[dict[str, float]] = [{"a": 1.0}, {"b": -0.7}, {"c": 0.3}, {"c": 0.9, "a": -0.4, "b": 2.1}]


class Net(torch.nn.Module):
    """Layers one after another."""

    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def numbers(*shape: int) -> Inputs:
    return lambda samples: torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1))


def with_adapters(net: Net, names: str = "abc", dtype: torch.dtype | None = torch.float32) -> Net:
    """`dtype`: of all weights afterwards; None: each as it is."""
    torch.manual_seed(3)
    for name in names:
        config = LoraConfig(target_modules=["0", "1"], init_lora_weights=False, **CONFIGS[name])
        inject_adapter_in_model(config, net, name)
    if dtype is not None:
        net = net.to(dtype)
    return net.requires_grad_(False).eval()


def truth_of(net: Net, x: torch.Tensor, scales: dict[str, float]) -> torch.Tensor:
    """What diffusers' `set_adapters` and a forward give; without adapters what `disable_lora` does."""
    for layer in net.modules():
        if isinstance(layer, LoraLayer):
            layer.enable_adapters(bool(scales))
    set_weights_and_activate_adapters(net, list(scales), list(scales.values()))
    return net(x)


def told_of(net: Net, x: torch.Tensor, *samples: tuple[int, dict[str, float]], is_even: bool = True) -> torch.Tensor:
    with applied(net, samples, is_even):
        return net(x)
