"""The weights of a denoiser split over ranks, by diffusers' tensor parallelism and the plan of the model's class."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from diffusers.hooks.tensor_parallel import (
    _SUPPORTED_TP_DEVICES,
    _check_tp_supported,
    apply_tensor_parallel,
    resolve_tp_shard_specs,
)
from diffusers.models._modeling_parallel import TensorParallelConfig
from torch.distributed.device_mesh import DeviceMesh

from deployments.errors import NotSupportedError


class SplitByWeights:
    """One module of which each rank has a part of the weights."""

    holds_all = False

    def __init__(self, module: torch.nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
        config = TensorParallelConfig(tp_degree=mesh.size())
        config.setup(mesh.get_local_rank(), mesh.size(), device, mesh)
        apply_tensor_parallel(module, config, module._tp_plan)

    def set_uneven(self, uneven: bool) -> None:
        """Of no matter: lengths are not split."""

    def whole(self) -> AbstractContextManager[None]:
        """Raises NotSupportedError."""
        raise NotSupportedError(
            "parallel.tensor: this request's pipeline changes its denoiser, or gives it what cannot be sent to the "
            "other ranks: it needs a replica that holds all weights"
        )


def split_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Those of which each rank has a part, each once."""
    plan = getattr(module, "_tp_plan", None) or {}
    specs = resolve_tp_shard_specs(module, plan, 1)
    return [module.get_parameter(name) for name, spec in specs.items() if spec.dim is not None]


def weights_problem(module: torch.nn.Module, degree: int, device: torch.device) -> str | None:
    """Why they cannot be split over so many ranks; None: they can."""
    plan, name = getattr(module, "_tp_plan", None), type(module).__name__
    if plan is None:
        return f"{name} has no plan for it in diffusers"
    if device.type not in _SUPPORTED_TP_DEVICES:
        return f"diffusers splits weights on {', '.join(_SUPPORTED_TP_DEVICES)}, not on {device.type}"
    if any(type(parameter) is not torch.nn.Parameter for parameter in module.parameters()):
        return "its weights are quantised, which cannot be split: leave `precision` out"
    config = TensorParallelConfig(tp_degree=degree)
    try:
        _check_tp_supported(name, plan, getattr(module.config, "num_attention_heads", None), config, model=module)
        resolve_tp_shard_specs(module, plan, degree)
    except ValueError as error:
        return str(error)
    return None
