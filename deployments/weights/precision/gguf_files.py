"""GGUF files: the weights of a model of diffusers in blocks of few bits, which each layer takes apart when it runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from deployments.errors import CheckpointError
from deployments.weights.locate import local_path, resolve_files
from deployments.weights.reading.missing import refuse_missing_weights

SUFFIX = ".gguf"


def find_gguf(address: str, cache_root: Path) -> Path:
    """The local path of a GGUF file: a path, s3://bucket/key, or owner/repository/path of the hub. CheckpointError."""
    if (here := local_path(address)).is_file():
        return here
    if address.startswith("s3://"):
        folder, _, name = address.rpartition("/")
        return resolve_files(folder, (name,), cache_root, use_streamer=True)[0]
    parts = address.split("/")
    if len(parts) < 3 or address.startswith(("/", ".", "~")):
        raise CheckpointError(f"{address} is neither a file here, nor s3://bucket/key, nor owner/repository/file")
    return resolve_files("/".join(parts[:2]), ("/".join(parts[2:]),), cache_root, use_streamer=True)[0]


def read_gguf(cls: Any, folder: Path, file: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of the class, with the settings of `folder` and the weights of `file`, computing in `dtype`.

    The file is mapped: no more of it is in the host's memory than what is on its way to the device. Raises ValueError
    where diffusers cannot read the class from a single file, or the file is not of this model.
    """
    from diffusers import GGUFQuantizationConfig
    from diffusers.loaders.single_file_model import _get_single_file_loadable_mapping_class

    if not hasattr(cls, "from_single_file") or _get_single_file_loadable_mapping_class(cls) is None:
        raise ValueError(f"diffusers reads no GGUF file as a {cls.__name__}")
    model = cls.from_single_file(
        mapped_tensors(file),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        device=device,
        local_files_only=True,
    )
    refuse_missing_weights(model)
    take_apart_what_is_no_linear_layer(model, dtype)
    return model


def mapped_tensors(file: Path) -> dict[str, torch.Tensor]:
    """As diffusers' load_gguf_checkpoint gives them, over the pages of the file. ValueError for other formats."""
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType, GGUFReader

    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    tensors: dict[str, torch.Tensor] = {}
    for entry in GGUFReader(file).tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            data = torch.from_numpy(entry.data)
        kind = entry.tensor_type
        if kind == GGMLQuantizationType.BF16:
            tensors[entry.name] = data.view(torch.bfloat16)
        elif kind in plain:
            tensors[entry.name] = data
        elif kind in SUPPORTED_GGUF_QUANT_TYPES:
            tensors[entry.name] = GGUFParameter(data, quant_type=kind)
        else:
            raise ValueError(f"{file}: diffusers cannot take {entry.name} apart, which is stored as {kind.name}")
    return tensors


def take_apart_what_is_no_linear_layer(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Only linear layers can compute with blocks: norms and embeddings would take them for numbers."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    for module in model.modules():
        if not isinstance(module, GGUFLinear):
            for name, parameter in module._parameters.items():
                if isinstance(parameter, GGUFParameter):
                    numbers = dequantize_gguf_tensor(parameter).to(dtype)
                    module._parameters[name] = torch.nn.Parameter(numbers.as_subclass(torch.Tensor), False)
