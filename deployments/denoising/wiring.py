"""Notices pipelines that rewire the denoiser, which all requests share, and puts it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Wiring:
    """The parts of a model that pipelines are known to exchange: attention processors and hooks."""

    parts: tuple[tuple[torch.nn.Module, Any, tuple[Any, ...], tuple[Any, ...]], ...]


def read_wiring(model: torch.nn.Module) -> Wiring:
    return Wiring(
        tuple(
            (
                module,
                module.__dict__.get("processor"),
                tuple(module._forward_hooks.items()),
                tuple(module._forward_pre_hooks.items()),
            )
            for module in model.modules()
        )
    )


def restore_wiring(before: Wiring, model: torch.nn.Module) -> bool:
    """Returns whether anything had been changed."""
    now = read_wiring(model)
    if len(now.parts) == len(before.parts) and all(
        a[0] is b[0] and a[1] is b[1] and a[2] == b[2] and a[3] == b[3]
        for a, b in zip(now.parts, before.parts, strict=True)
    ):
        return False
    for module, processor, hooks, pre_hooks in before.parts:
        if processor is not None:
            module.__dict__["processor"] = processor
        module._forward_hooks.clear()
        module._forward_hooks.update(dict(hooks))
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks.update(dict(pre_hooks))
    return True
