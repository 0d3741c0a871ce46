"""MLX's fused RMS and layer norms in place of torch's, on Apple GPUs."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack
from diffusers.models.normalization import FP32LayerNorm, RMSNorm

from deployments.accelerations.acceleration import Acceleration
from deployments.modules import AccelerationError, Kernel, StageModules
from env_config.variables import EnvConfig

VARIABLE = "SGLANG_USE_MLX"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def install(modules: StageModules, env: EnvConfig) -> str:
    """Replace the forward of every norm over the last dimension that MLX has a kernel for.

    Raises AccelerationError on MPS without MLX.
    """
    if modules.device.name != "mps":
        return f"mlx_norms: inert, {VARIABLE} is for mps and this replica runs on {modules.device.name}"
    try:
        mx = importlib.import_module("mlx.core")
    except ImportError as error:
        raise AccelerationError(f"{VARIABLE}=1 needs MLX: pip install 'triptych[mlx]' ({error})") from error
    replaced: Counter[str] = Counter()
    for name, component in modules.components.items():
        for module in component.modules():
            build = FORWARDS.get(type(module))
            if build is not None and _is_over_last_dimension(module):
                module.forward = build(mx, module, modules.wrap_kernel, name)
                replaced[name] += 1
    counts = ", ".join(f"{count} of {name}" for name, count in replaced.items())
    return f"mlx_norms: {counts or 'no'} norms run in MLX"


MLX_NORMS = Acceleration("mlx_norms", lambda env: env.apple_mps.use_mlx is True, install, lambda env: True)


def _is_over_last_dimension(module: Any) -> bool:
    shape = module.dim if isinstance(module, RMSNorm) else module.normalized_shape
    return len(shape) == 1


WrapKernel = Callable[[str, Kernel], Kernel]


def _rms_norm(mx: Any, module: Any, wrap_kernel: WrapKernel, component: str) -> Kernel:
    weight, bias = _to_mlx(mx, module.weight), getattr(module, "bias", None)

    def compute(inputs: torch.Tensor) -> torch.Tensor:
        eps = torch.finfo(inputs.dtype).eps if module.eps is None else module.eps
        return _run(mx, mx.fast.rms_norm, inputs, weight, eps)

    kernel = wrap_kernel(f"rms_norm.{component}.mlx", compute)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = kernel(inputs).to(_rms_norm_dtype(module, inputs.dtype))
        return output if bias is None else output + bias

    return forward


def _rms_norm_dtype(module: Any, input_dtype: torch.dtype) -> torch.dtype:
    if module.weight is None:
        return input_dtype
    weight_dtype: torch.dtype = module.weight.dtype
    # diffusers' own class ends in the dtype of its weight, torch's promotes.
    return weight_dtype if isinstance(module, RMSNorm) else torch.promote_types(input_dtype, weight_dtype)


def _layer_norm(mx: Any, module: Any, wrap_kernel: WrapKernel, component: str) -> Kernel:
    weight, bias = _to_mlx(mx, module.weight), _to_mlx(mx, module.bias)
    kernel = wrap_kernel(
        f"layer_norm.{component}.mlx",
        lambda inputs: _run(mx, mx.fast.layer_norm, inputs, weight, bias, module.eps),
    )

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = kernel(inputs).to(inputs.dtype)
        return output

    return forward


def _run(mx: Any, function: Callable[..., Any], inputs: torch.Tensor, *arguments: Any) -> torch.Tensor:
    if inputs.dtype not in DTYPES:
        raise TypeError(f"{VARIABLE}=1: MLX norms take {', '.join(map(str, DTYPES))}, got {inputs.dtype}")
    output = function(mx.array(inputs.detach().cpu()), *arguments)
    mx.eval(output)  # in this thread: MLX's queue of pending work belongs to it
    return torch.utils.dlpack.from_dlpack(output).to(inputs.device)


def _to_mlx(mx: Any, parameter: torch.Tensor | None) -> Any:
    if parameter is None:
        return None
    array = mx.array(parameter.detach().cpu())
    mx.eval(array)  # only what has been computed may be used in other threads
    return array


# By exact class: a subclass may compute something else.
FORWARDS: dict[type[torch.nn.Module], Callable[[Any, Any, WrapKernel, str], Kernel]] = {
    torch.nn.RMSNorm: _rms_norm,
    RMSNorm: _rms_norm,
    torch.nn.LayerNorm: _layer_norm,
    FP32LayerNorm: _layer_norm,
}
