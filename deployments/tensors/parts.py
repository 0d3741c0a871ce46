"""The plain tensors that a tensor consists of: itself, or for a quantised one its codes, scales and tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Part = tuple[str, torch.Tensor]  # where it is in the tensor (empty: it is the tensor), and its numbers


def plain_parts(tensor: torch.Tensor) -> Iterator[Part]:
    """In a fixed order. torchao's tensors flatten themselves; those of bitsandbytes and GGUF carry more beside them."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            for place, part in plain_parts(getattr(tensor, name)):
                yield f".{name}{place}", part
        return
    if is_plain_subclass(tensor):
        yield "", tensor.detach().as_subclass(torch.Tensor)
        yield from _beside(vars(tensor))
    else:
        yield "", tensor.detach()


def is_plain_subclass(tensor: torch.Tensor) -> bool:
    """Whether its class only says more of the numbers, which are where those of any tensor are."""
    cls = type(tensor)
    return cls not in (torch.Tensor, torch.nn.Parameter) and cls.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _beside(attributes: dict[str, Any], path: str = "") -> Iterator[Part]:
    for name, value in sorted(attributes.items()):
        if isinstance(value, torch.Tensor):
            yield f"{path}.{name}", value.detach()
        elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module | type) and not callable(value):
            yield from _beside(vars(value), f"{path}.{name}")


def num_bytes(tensor: torch.Tensor) -> dict[int, int]:
    """Of each of its plain tensors by address: one that several tensors share counts once."""
    return {part.data_ptr(): part.nbytes for _, part in plain_parts(tensor) if part.device.type != "meta"}
