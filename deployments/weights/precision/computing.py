"""In which dtype a module computes, whatever its weights are kept in."""

from __future__ import annotations

import torch
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook


def dtype_computed_in(module: torch.nn.Module) -> torch.dtype | None:
    """That of its first floating weights, where these are not cast layer by layer; None where it has none."""
    for part in module.modules():
        hooks = getattr(part, "_diffusers_hook", None)
        for hook in hooks.hooks.values() if hooks is not None else ():
            if isinstance(hook, LayerwiseCastingHook):
                cast_up: torch.dtype = hook.compute_dtype
                return cast_up
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
