"""Schemes of torchao: what it is told, and whether it can run on a device."""

from __future__ import annotations

from typing import Any

import torch

PROBE_SIZE = 64  # float8 and int8 matrix units take multiples of 16


def for_diffusers(config: str) -> Any:
    from diffusers import TorchAoConfig

    return TorchAoConfig(config_of(config))


def for_transformers(config: str) -> Any:
    from transformers import TorchAoConfig

    return TorchAoConfig(config_of(config))


def obstacle_of(config: str, device: torch.device) -> str | None:
    """Why a layer in this scheme cannot be run on the device: it is tried with a small one."""
    from torchao.quantization import quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(PROBE_SIZE, PROBE_SIZE)).to(device, torch.bfloat16)
    inputs = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            quantize_(layer, config_of(config))
            layer(inputs)
    except Exception as error:  # noqa: BLE001  (asserts, missing operators, drivers: each says it in its own way)
        cause = str(error).strip().partition("\n")[0]
        return f"torchao cannot run it on {device.type}: {cause or type(error).__name__}"
    return None


def config_of(name: str) -> Any:
    import torchao.quantization

    return getattr(torchao.quantization, name)()
