"""Puts a tensor in the place of a parameter or a buffer of a module."""

from __future__ import annotations

import torch


def assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """`name` is the path that state_dict gives it; a parameter stays one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        requires_grad = getattr(module, leaf).requires_grad and tensor.dtype.is_floating_point
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        module._buffers[leaf] = tensor
