"""The schemes of `precision`: a row each. Nothing here imports a library that is not asked for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from deployments.weights.precision.scheme import INSTALL, Filling, Scheme

if TYPE_CHECKING:
    import torch

HALF = ("bfloat16", "float16")
ANY = (*HALF, "float32")
PLAIN = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # schemes that are a dtype and nothing else


def torchao_scheme(name: str, says: str, config: str, compute_dtypes: tuple[str, ...] = ANY) -> Scheme:
    """`config` is the class of torchao.quantization."""

    def obstacle(device: torch.device) -> str | None:
        from deployments.weights.precision.torchao_weights import obstacle_of

        return obstacle_of(config, device)

    def begin(model: Any, dtype: torch.dtype, device: torch.device) -> Filling:
        from deployments.weights.precision.quantised import Quantised
        from deployments.weights.precision.torchao_weights import for_diffusers

        return Quantised(model, for_diffusers(config, device), dtype, device)

    def for_transformers(dtype: torch.dtype, device: torch.device) -> Any:
        from deployments.weights.precision.torchao_weights import for_transformers

        return for_transformers(config, device)

    return Scheme(name, says, 8, compute_dtypes, ("torchao",), obstacle, begin, for_transformers)


def nf4_obstacle(device: torch.device) -> str | None:
    from deployments.weights.precision.nf4 import obstacle_of

    return obstacle_of(device)


def begin_nf4(model: Any, dtype: torch.dtype, device: torch.device) -> Filling:
    from deployments.weights.precision.nf4 import for_diffusers
    from deployments.weights.precision.quantised import Quantised

    return Quantised(model, for_diffusers(dtype), dtype, device)


def nf4_for_transformers(dtype: torch.dtype, device: torch.device) -> Any:
    from deployments.weights.precision.nf4 import for_transformers

    return for_transformers(dtype)


def layerwise_obstacle(device: torch.device) -> str | None:
    from deployments.weights.precision.layerwise import obstacle_of

    return obstacle_of(device)


def begin_layerwise(model: Any, dtype: torch.dtype, device: torch.device) -> Filling:
    from deployments.weights.precision.layerwise import Layerwise

    return Layerwise(model, dtype)


def no_obstacle(device: torch.device) -> str | None:
    return None


SCHEMES = (
    torchao_scheme("fp8", "weights of linear layers in float8 (e4m3), multiplied in dtype", "Float8WeightOnlyConfig"),
    torchao_scheme(
        "fp8_dynamic",
        "weights and inputs of linear layers in float8 (e4m3), multiplied by the GPU's float8 units",
        "Float8DynamicActivationFloat8WeightConfig",
        ("bfloat16",),
    ),
    torchao_scheme("int8", "weights of linear layers in int8, multiplied in the dtype", "Int8WeightOnlyConfig"),
    torchao_scheme(
        "int8_dynamic",
        "weights and inputs of linear layers in int8, multiplied as integers",
        "Int8DynamicActivationInt8WeightConfig",
    ),
    Scheme(
        "nf4",
        "weights of linear layers in NF4, 4 bits in blocks of 64, multiplied in the dtype",
        4.5,
        ANY,
        ("bitsandbytes",),
        nf4_obstacle,
        begin_nf4,
        nf4_for_transformers,
    ),
    Scheme(
        "layerwise",
        "weights of linear and convolution layers and embeddings kept in float8 (e4m3), cast to the dtype one layer at "
        "a time",
        8,
        ANY,
        (),
        layerwise_obstacle,
        begin_layerwise,
        None,
    ),
)
# A GGUF file brings its own bits: `deployments.weights.precision.gguf_files` reads it.
GGUF = Scheme(
    "gguf", "weights in the blocks of a GGUF file, multiplied in the dtype", 0, ANY, ("gguf",), no_obstacle, None, None
)


def scheme_named(name: str) -> Scheme | None:
    """None for a plain dtype."""
    return next((scheme for scheme in SCHEMES if scheme.name == name), None)


def missing_packages(scheme: Scheme) -> str | None:
    """The sentence that says what to install; None where nothing is missing."""
    missing = [package for package in scheme.packages if importlib.util.find_spec(package) is None]
    return f"it needs {' and '.join(missing)}, which is not installed: {INSTALL}" if missing else None
