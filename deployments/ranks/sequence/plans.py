"""What of a denoiser's sequence is split and gathered at which of its modules: diffusers' plan of its class, mended."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput

Plan = Mapping[str, Any]  # diffusers' ContextParallelModelPlan: by module


def plan_of(module: torch.nn.Module) -> Plan | None:
    """None: diffusers has none for its class."""
    plan: Plan | None = getattr(module, "_cp_plan", None)
    if not plan:
        return None
    forgotten = FURTHER.get(type(module).__name__)
    further = forgotten(module) if forgotten else {}
    names = [name for name in plan if not _is_past_the_last(module, name)]
    together = {name: {**plan[name], **further.get(name, {})} if name in further else plan[name] for name in names}
    return together | {name: rows for name, rows in further.items() if name not in together}


def _time_of_each_token(module: torch.nn.Module) -> Plan:
    """As Wan's plan has it: given where a first picture is kept."""
    return {"": {"timestep": ContextParallelInput(split_dim=1, expected_dims=2)}}


def _with_sound(module: torch.nn.Module) -> Plan:
    """The sound is not split; the positions of the video by which the two attend to each other are."""
    config: Any = module.config
    axis, dims = (2, 4) if config.rope_type == "split" else (1, 3)
    both = {index: ContextParallelInput(split_dim=axis, expected_dims=dims, split_output=True) for index in (0, 1)}
    return {**_time_of_each_token(module), "rope": both, "cross_attn_rope": both}


# What the plans of diffusers 0.42 forget, by class.
FURTHER: Mapping[str, Callable[[torch.nn.Module], Plan]] = {
    "LTXVideoTransformer3DModel": _time_of_each_token,
    "LTX2VideoTransformer3DModel": _with_sound,
}


def _is_past_the_last(module: torch.nn.Module, name: str) -> bool:
    """Helios' plan counts the blocks that its largest checkpoint has."""
    part: Any = module
    for atom in name.split("."):
        if isinstance(part, torch.nn.ModuleList):
            return bool(re.fullmatch(r"\d+", atom)) and int(atom) >= len(part)
        part = getattr(part, atom, None)
    return False
