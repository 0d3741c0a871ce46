"""Schemes of torchao: what it is told, and whether it can run on a device."""

from __future__ import annotations

from typing import Any

import torch

MULTIPLIES_INTEGERS = "Int8DynamicActivationInt8WeightConfig"  # sums overflow on CPUs without VNNI
PROBE_SIZE = 64  # float8 and int8 matrix units take multiples of 16


def for_diffusers(config: str, device: torch.device) -> Any:
    from diffusers import TorchAoConfig

    return TorchAoConfig(config_of(config, device))


def for_transformers(config: str, device: torch.device) -> Any:
    from transformers import TorchAoConfig

    return TorchAoConfig(config_of(config, device))


def obstacle_of(config: str, device: torch.device) -> str | None:
    """Why a layer in this scheme cannot be run on the device: it is tried with a small one."""
    from torchao.quantization import quantize_

    linear = torch.nn.Linear(PROBE_SIZE, PROBE_SIZE, bias=False, device="meta", dtype=torch.bfloat16)
    layer = torch.nn.Sequential(linear).to_empty(device=device)
    inputs = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            linear.weight.fill_(1)
            quantize_(layer, config_of(config, device))
            layer(inputs)
    except Exception as error:  # noqa: BLE001  (asserts, missing operators, drivers: each says it in its own way)
        cause = str(error).strip().partition("\n")[0]
        return f"torchao cannot run it on {device.type}: {cause or type(error).__name__}"
    return None


def config_of(name: str, device: torch.device) -> Any:
    """Scales for each row: one for a whole tensor would let requests of a merged batch change each other's numbers.

    Inductor's settings are those of the process; they are left alone.
    """
    from torchao import quantization
    from torchao.utils import should_reduce_range

    options: dict[str, Any] = {"granularity": quantization.PerRow(), "set_inductor_config": False}
    if name == MULTIPLIES_INTEGERS:
        options["reduce_range"] = should_reduce_range(device)
    return getattr(quantization, name)(**options)
