"""FlashInfer's FP4 matrix multiplication for the linear layers of NVFP4 checkpoints, on CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from deployments.accelerations.acceleration import Acceleration
from deployments.modules import AccelerationError, StageModules
from deployments.weights.quantization.nvfp4 import Gemm, NVFP4Linear
from env_config.variables import EnvConfig

VARIABLE = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
FIRST_CAPABILITY = (10, 0)  # Blackwell: the first GPUs with FP4 tensor cores
ROWS_PER_TILE = 128  # of FlashInfer's layouts of weights and scales
LARGEST_PROBE_ERROR = 0.3  # relative; quantised activations give some 0.1


def install(modules: StageModules, env: EnvConfig) -> str:
    """Let the NVFP4 layers of the stage multiply with FlashInfer on CUDA; elsewhere they dequantise in torch.

    Raises AccelerationError when a backend was named, or the GPU has FP4 units, and FlashInfer cannot run.
    """
    layers = [
        (name, layer)
        for name, component in modules.components.items()
        for layer in component.modules()
        if isinstance(layer, NVFP4Linear)
    ]
    backend: str | None = env.quantization.flashinfer_fp4_gemm_backend
    if not layers:
        return "" if backend is None else f"fp4_gemm: inert, {VARIABLE} is for NVFP4 layers and none is here"
    if modules.device.name != "cuda":
        return (
            f"fp4_gemm: {len(layers)} NVFP4 layers dequantise in torch, "
            f"{VARIABLE} is for cuda and this replica runs on {modules.device.name}"
        )
    capability = torch.cuda.get_device_capability(modules.device.torch_device)
    if capability < FIRST_CAPABILITY:
        have = f"this GPU's compute capability is {capability[0]}.{capability[1]}"
        if backend is not None:
            raise AccelerationError(f"{VARIABLE}={backend} needs compute capability 10.0, {have}")
        return f"fp4_gemm: {len(layers)} NVFP4 layers dequantise in torch, {have}"
    backend = backend or default_backend(capability)
    flashinfer = _import_flashinfer(backend)
    probe = torch.linspace(-1, 1, layers[0][1].in_features, device=modules.device.torch_device)
    expected = layers[0][1].multiply_dequantized(probe[None])
    for name, layer in layers:
        gemm = flashinfer_gemm(flashinfer, backend, layer)
        layer.gemm = modules.wrap_kernel(f"fp4_gemm.{name}.{backend}", gemm)
    _check_output(layers[0][1].gemm, probe[None], expected, backend)
    return f"fp4_gemm: FlashInfer's {backend} multiplies in {len(layers)} NVFP4 layers"


FP4_GEMM = Acceleration(
    "fp4_gemm",
    lambda env: True,  # a checkpoint may have NVFP4 layers
    install,
    lambda env: env.quantization.flashinfer_fp4_gemm_backend,
)


def default_backend(capability: tuple[int, int]) -> str:
    """What SGLang chooses when the variable is not set: compute capability 12 has no trtllm kernels."""
    return "auto" if capability[0] == 12 else "trtllm"


def flashinfer_gemm(flashinfer: Any, backend: str, layer: NVFP4Linear) -> Gemm:
    """Bring the layer's tensors into the layout of the backend, for good, and return its multiplication."""
    num_outputs = layer.out_features
    weight, scale = LAYOUTS.get(backend, _interleaved)(flashinfer, layer)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = scale
    inverse_input_scale = (1.0 / layer.input_scale).reshape(1)
    alpha = (layer.input_scale * layer.weight_scale_2).reshape(1)

    def multiply(inputs: torch.Tensor) -> torch.Tensor:
        packed, input_scales = flashinfer.fp4_quantize(inputs.to(torch.bfloat16).contiguous(), inverse_input_scale)
        output: torch.Tensor = flashinfer.mm_fp4(
            packed, weight.T, input_scales, scale.T, alpha, torch.bfloat16, backend=backend
        )
        return output[:, :num_outputs]

    return multiply


def _interleaved(flashinfer: Any, layer: NVFP4Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """cutlass, cudnn, auto: the weight as it is, its scales in tiles of 128 x 4."""
    rows, columns = layer.weight_scale.shape
    flat = flashinfer.block_scale_interleave(layer.weight_scale.view(torch.uint8).contiguous())
    return layer.weight.data, flat.reshape(_padded(rows, ROWS_PER_TILE), _padded(columns, 4))


def _shuffled(flashinfer: Any, layer: NVFP4Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """trtllm: the rows of weight and scales padded to whole tiles and shuffled."""
    rows, columns = layer.weight_scale.shape
    missing = _padded(rows, ROWS_PER_TILE) - rows
    weight = torch.nn.functional.pad(layer.weight.data, (0, 0, 0, missing))
    scale = torch.nn.functional.pad(layer.weight_scale.view(torch.uint8), (0, 0, 0, missing))
    shuffled_scale = flashinfer.shuffle_matrix_sf_a(scale, ROWS_PER_TILE)
    return (
        flashinfer.shuffle_matrix_a(weight, ROWS_PER_TILE).contiguous(),
        shuffled_scale.reshape(rows + missing, _padded(columns, 4)),
    )


LAYOUTS: dict[str, Callable[[Any, NVFP4Linear], tuple[torch.Tensor, torch.Tensor]]] = {"trtllm": _shuffled}


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _import_flashinfer(backend: str) -> Any:
    try:
        return importlib.import_module("flashinfer")
    except (ImportError, OSError, RuntimeError) as error:
        raise AccelerationError(
            f"{VARIABLE}={backend}: NVFP4 layers need FlashInfer on this GPU: pip install flashinfer-python ({error})"
        ) from error


def _check_output(gemm: Gemm, inputs: torch.Tensor, expected: torch.Tensor, backend: str) -> None:
    try:
        output = gemm(inputs).float()
    except Exception as error:
        raise AccelerationError(f"{VARIABLE}={backend}: FlashInfer does not run here: {error}") from error
    difference = ((output - expected).norm() / expected.norm()).item()
    if not difference <= LARGEST_PROBE_ERROR:
        raise AccelerationError(
            f"{VARIABLE}={backend}: FlashInfer gives wrong numbers, off by {difference:.0%} of their size"
        )
