"""Linear layers with NVFP4 weights in ModelOpt's layout, and how diffusers loads a checkpoint that has them.

A weight W of shape [N, K] is stored as four tensors: `weight` [N, K/2] uint8, two E2M1 codes a byte, the even
column in the low nibble; `weight_scale` [N, K/16] float8_e4m3fn, one per 16 values; `weight_scale_2`, a float32
scalar: W = code * weight_scale * weight_scale_2; and `input_scale`, the same scalar for activations.
`register` makes diffusers load such checkpoints: their quantisation method is `nvfp4`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.bfl.utils import dequantize_nvfp4, quantize_nvfp4
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

VALUES_PER_SCALE = 16
LARGEST_E4M3, LARGEST_E2M1 = 448.0, 6.0
# Activations up to this size are not clipped, and blocks of 16 that stay below a 28672nd of it lose
# precision of their scale: no calibration data are needed.
LARGEST_ACTIVATION = 1024.0
LAYER_TENSORS = ("weight", "weight_scale", "weight_scale_2", "input_scale")

Gemm = Callable[[torch.Tensor], torch.Tensor]  # [M, K] -> [M, N]


class NVFP4Linear(torch.nn.Linear):
    """A linear layer over an NVFP4 weight; `gemm` multiplies with it, by default dequantised in torch."""

    weight_scale: torch.Tensor
    weight_scale_2: torch.Tensor
    input_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        device = self.weight.device
        packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(out_features, in_features // VALUES_PER_SCALE, device=device)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.register_buffer("weight_scale", scales.to(torch.float8_e4m3fn))
        self.register_buffer("weight_scale_2", torch.empty((), device=device))
        self.register_buffer("input_scale", torch.empty((), device=device))
        self.gemm: Gemm = self.multiply_dequantized

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.gemm(inputs.reshape(-1, self.in_features)).to(inputs.dtype)
        if self.bias is not None:
            output = output + self.bias.to(inputs.dtype)
        return output.reshape(*inputs.shape[:-1], self.out_features)

    def multiply_dequantized(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.dequantized_weight().to(inputs.dtype))

    def dequantized_weight(self) -> torch.Tensor:
        """[N, K] float32."""
        weight: torch.Tensor = dequantize_nvfp4(self.weight, self.weight_scale, self.weight_scale_2)
        return weight

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NVFP4Linear:
        # A module's .to(dtype) casts every floating-point tensor; these would lose their meaning.
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            is_packed = any(tensor is getattr(self, name) for name in LAYER_TENSORS)
            moved = fn(tensor)
            return tensor.to(moved.device) if is_packed and moved.dtype != tensor.dtype else moved

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


def quantized_tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four tensors of a layer, by their names in it, for a weight [N, K] with K a multiple of 16."""
    packed, scale, scale_2 = quantize_nvfp4(weight)
    input_scale = torch.tensor(LARGEST_ACTIVATION / (LARGEST_E4M3 * LARGEST_E2M1))
    return dict(zip(LAYER_TENSORS, (packed, scale, scale_2, input_scale), strict=True))


class _Method(StrEnum):
    NVFP4 = "nvfp4"


class NVFP4Config(QuantizationConfigMixin):
    """The `quantization_config` of a component's config.json: `{"quant_method": "nvfp4"}`."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = _Method.NVFP4

    def __repr__(self) -> str:
        return "NVFP4Config()"


class NVFP4Quantizer(DiffusersQuantizer):
    """Puts an NVFP4Linear wherever the checkpoint has a `weight_scale_2`, and fills it without casting."""

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: NVFP4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.layers: set[str] = set()

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        return torch.bfloat16 if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        suffix = ".weight_scale_2"
        self.layers = {key.removesuffix(suffix) for key in loaded_keys if key.endswith(suffix)}
        return loaded_keys

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_: Any) -> None:
        replace_linears(model, self.layers)

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **_: Any) -> torch.nn.Module:
        return model

    def check_if_quantized_param(self, model: Any, param_value: Any, param_name: str, *_: Any, **__: Any) -> bool:
        layer, _dot, tensor = param_name.rpartition(".")
        return layer in self.layers and tensor in LAYER_TENSORS

    def check_quantized_param_shape(self, *_: Any, **__: Any) -> bool:
        return True

    def create_quantized_param(
        self,
        model: torch.nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, torch.Tensor],
        *_: Any,
        **__: Any,
    ) -> None:
        stored = state_dict[param_name]  # param_value has been cast to the model's dtype
        path, _dot, name = param_name.rpartition(".")
        layer = model.get_submodule(path)
        expected = getattr(layer, name)
        if stored.shape != expected.shape or stored.dtype != expected.dtype:
            raise ValueError(
                f"{param_name} must be {expected.dtype} of shape {list(expected.shape)} in NVFP4's layout, "
                f"got {stored.dtype} of shape {list(stored.shape)}"
            )
        value = stored.to(target_device)
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False) if name == "weight" else value)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Add the quantisation method `nvfp4` to those of diffusers."""
    AUTO_QUANTIZER_MAPPING[_Method.NVFP4.value] = NVFP4Quantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[_Method.NVFP4.value] = NVFP4Config


def replace_linears(model: torch.nn.Module, paths: Iterable[str]) -> None:
    """Put empty NVFP4 layers in place of the linear layers at these paths."""
    for path in paths:
        linear = model.get_submodule(path)
        if not isinstance(linear, torch.nn.Linear):
            raise ValueError(f"{path} has NVFP4 tensors but is a {type(linear).__name__}, not a linear layer")
        parent, _dot, name = path.rpartition(".")
        with init_empty_weights(include_buffers=True):
            layer = NVFP4Linear(linear.in_features, linear.out_features, linear.bias is not None)
        setattr(model.get_submodule(parent), name, layer)
