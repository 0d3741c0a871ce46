"""The scheme of bitsandbytes: NF4, with the scales of its blocks quantised too."""

from __future__ import annotations

from typing import Any

import torch

DEVICES = ("cuda", "xpu", "mps")  # ROCm's is cuda; diffusers' quantiser refuses a machine without one of them


def for_diffusers(dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings(dtype))


def for_transformers(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**settings(dtype))


def settings(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def obstacle_of(device: torch.device) -> str | None:
    if device.type not in DEVICES:
        return f"it needs a GPU ({', '.join(DEVICES)}), this replica runs on {device.type}"
    return None
