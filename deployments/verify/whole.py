"""The unsplit pipeline and the stages of its split in one process, over the same weights.

Each process of the split is loaded as ever: its own pipeline object, schedulers and tokenizers, and skeletons for what
other processes hold. Only the weights are those of the whole: a stage that reads what it does not have still finds a
skeleton or a half without numbers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from deployments.devices import Device
from deployments.messages import STAGES, StageName
from deployments.model import ModelArgs
from deployments.stage_pipeline.loading import UNUSED_HALF, StagePipeline
from deployments.stages.build import build_stage
from env_config.variables import EnvConfig

Processes = tuple[tuple[StageName, ...], ...]  # the stages of each


@dataclass(frozen=True)
class Whole:
    """`unsplit` holds all weights; `stages` has for each stage what the process holds that runs it."""

    unsplit: StagePipeline
    stages: dict[StageName, StagePipeline]


def load_whole(model: ModelArgs, processes: Processes, env: EnvConfig, device: Device) -> Whole:
    """Raises what build_stage raises. All weights are on the device, those that wait on the host in service too."""
    model = model.model_copy(update={"offload": {}})
    unsplit = build_stage(model, STAGES, env, device)
    loaded = [build_stage(model, stages, env, device, held=held_by(unsplit, stages)) for stages in processes]
    return Whole(unsplit, {name: process for process in loaded for name in process.stages})


def held_by(unsplit: StagePipeline, stages: tuple[StageName, ...]) -> dict[str, torch.nn.Module]:
    """The components that a process of these stages holds, by name: the same modules, or a half of an autoencoder."""
    held = {n: m for n, m in unsplit.components.items() if unsplit.layout.stages_of[n] & set(stages)}
    if len(stages) == 1 and stages[0] in UNUSED_HALF:
        half = UNUSED_HALF[stages[0]]
        held |= {name: without_half(held[name], half) for name in unsplit.layout.autoencoders if name in held}
    return held


def without_half(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """The module over the same weights, but for those of the submodule `name`, which are on the meta device."""
    half = getattr(module, name, None)
    if not isinstance(half, torch.nn.Module):
        return module
    changed = copy.copy(module)
    changed.__dict__["_modules"] = module._modules | {name: _without_numbers(half)}
    return changed


def _without_numbers(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that takes no memory: the copies of its tensors are on the meta device from the beginning."""
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)
