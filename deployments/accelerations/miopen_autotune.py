"""MIOpen's search for the fastest convolution kernels, inside the VAE only, on AMD GPUs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.modules.conv import _ConvNd

from deployments.accelerations.acceleration import Acceleration
from deployments.modules import Kernel, StageModules
from env_config.variables import EnvConfig

VARIABLE = "SGLANG_USE_ROCM_CUDNN_BENCHMARK"


def install(modules: StageModules, env: EnvConfig) -> str:
    """Let every convolution of the autoencoders search; torch's flag is as before outside of them."""
    if modules.device.name != "rocm":
        return f"miopen_autotune: inert, {VARIABLE} is for rocm and this replica runs on {modules.device.name}"
    if not modules.autoencoders:
        return "miopen_autotune: inert, this stage holds no autoencoder"
    lines = []
    for name, vae in modules.parts(modules.autoencoders).items():
        convolutions = [module for module in vae.modules() if isinstance(module, _ConvNd)]
        for convolution in convolutions:
            convolution.forward = _searching(convolution.forward)
        lines.append(f"MIOpen searches in {len(convolutions)} convolutions of {name}")
    return "miopen_autotune: " + "; ".join(lines)


MIOPEN_AUTOTUNE = Acceleration("miopen_autotune", lambda env: env.rocm.use_rocm_cudnn_benchmark, install)


def _searching(forward: Kernel) -> Kernel:
    @functools.wraps(forward)
    def searching_forward(*args: Any, **kwargs: Any) -> Any:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # ROCm's torch reads it for MIOpen
        try:
            return forward(*args, **kwargs)
        finally:
            torch.backends.cudnn.benchmark = before

    return searching_forward
