"""AITer's GroupNorm kernel in place of torch's in the VAE, on AMD GPUs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from deployments.accelerations.acceleration import Acceleration
from deployments.modules import AccelerationError, Kernel, StageModules
from env_config.variables import EnvConfig

VARIABLE = "SGLANG_USE_ROCM_VAE"


def install(modules: StageModules, env: EnvConfig) -> str:
    """Replace every affine GroupNorm of the autoencoders, sharing its parameters.

    Raises AccelerationError on ROCm without AITer's GroupNorm.
    """
    if modules.device.name != "rocm":
        return f"rocm_vae: inert, {VARIABLE} is for rocm and this replica runs on {modules.device.name}"
    if not modules.autoencoders:
        return "rocm_vae: inert, this stage holds no autoencoder"
    group_norm_class = _aiter_group_norm()
    lines = []
    for name, vae in modules.parts(modules.autoencoders).items():
        replaced = 0
        for parent, child_name, group_norm in list(_affine_group_norms(vae)):
            replacement = _sharing_parameters(group_norm_class, group_norm)
            kernel = modules.wrap_kernel(f"group_norm.{name}.aiter", replacement.forward)
            replacement.forward = _on_contiguous_input(kernel)
            setattr(parent, child_name, replacement)
            replaced += 1
        lines.append(f"AITer GroupNorm in {replaced} modules of {name}")
    return "rocm_vae: " + "; ".join(lines)


ROCM_VAE = Acceleration("rocm_vae", lambda env: env.rocm.use_rocm_vae, install)


def _aiter_group_norm() -> Any:
    try:
        return importlib.import_module("aiter.ops.groupnorm").GroupNorm
    except (ImportError, AttributeError, OSError) as error:
        raise AccelerationError(
            f"{VARIABLE}=true needs AITer with ops.groupnorm, which its releases on PyPI lack "
            f"(build it from ROCm's aiter repository): {error}"
        ) from error


def _affine_group_norms(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.GroupNorm]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.GroupNorm) and child.affine:
                yield parent, name, child


def _sharing_parameters(group_norm_class: Any, group_norm: torch.nn.GroupNorm) -> Any:
    replacement = group_norm_class(
        group_norm.num_groups,
        group_norm.num_channels,
        group_norm.eps,
        True,
        device=group_norm.weight.device,
        dtype=group_norm.weight.dtype,
    )
    replacement.weight, replacement.bias = group_norm.weight, group_norm.bias
    return replacement.train(group_norm.training)


def _on_contiguous_input(kernel: Kernel) -> Kernel:
    def forward(inputs: torch.Tensor) -> Any:  # [N, C, ...]
        return kernel(inputs.contiguous())

    return forward
