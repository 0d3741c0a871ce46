"""Weights that torch.save wrote: only tensors are taken from them, by torch's restricted unpickler."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deployments.errors import CheckpointError
from deployments.weights.files import refuse_lfs_pointer


def read_pickled(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The tensors of the files by name, mapped from disk where the files' format allows it.

    Raises CheckpointError for a file that is not whole or holds anything but tensors, by its name.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors |= read_pickled_file(file)
    return tensors


def read_adapter(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of an IP-Adapter, which come in groups (image_proj, ip_adapter), under `group.name`.

    Raises CheckpointError.
    """
    groups = load(file)
    if not isinstance(groups, dict) or not all(is_by_name(group) for group in groups.values()):
        raise CheckpointError(f"{file} does not hold groups of tensors by name: it is no IP-Adapter")
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def read_pickled_file(file: Path) -> dict[str, torch.Tensor]:
    loaded = load(file)
    if not is_by_name(loaded):
        raise CheckpointError(f"{file} does not hold tensors by name: it is no file of weights")
    tensors: dict[str, torch.Tensor] = loaded
    return tensors


def is_by_name(loaded: Any) -> bool:
    return isinstance(loaded, dict) and all(isinstance(value, torch.Tensor) for value in loaded.values())


def load(file: Path) -> Any:
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file} is empty: fetch it again")
        refuse_lfs_pointer(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is not whole, or it holds more than tensors and could run code when it is read: fetch it again, "
            "or take the safetensors file of this model"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError) as error:
        cause = str(error).partition("\n")[0]
        raise CheckpointError(f"{file} is not a whole file of torch.save: {cause}") from error
