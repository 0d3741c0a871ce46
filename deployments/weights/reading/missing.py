"""Refuses a model some of whose weights are in none of its files: libraries make them up at random."""

from __future__ import annotations

from typing import Any

import torch


def all_read(loaded: tuple[Any, dict[str, Any]]) -> Any:
    """The model that from_pretrained returned with its loading info. Raises ValueError where weights are missing."""
    model, info = loaded
    refuse_missing(sorted(info["missing_keys"]))
    return model


def refuse_missing_weights(module: torch.nn.Module) -> None:
    """Raises ValueError for a module with weights on the meta device."""
    refuse_missing([name for name, tensor in module.state_dict().items() if tensor.is_meta])


def refuse_missing(missing: list[str]) -> None:
    if missing:
        raise ValueError(f"its files lack {len(missing)} weights: {', '.join(missing[:3])} ...")
