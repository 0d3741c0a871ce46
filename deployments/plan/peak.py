"""The bytes of activations that live at once in a call on the meta device: an exact count of tensors' memory.

It holds no rounding of an allocator and no workspace of a library. Attention is counted as a fused kernel: its output
and no matrix of scores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_of(call: Callable[[], Any], weights: Iterable[torch.Tensor]) -> tuple[int, Any]:
    """The peak in bytes beside `weights`, and what the call returned."""
    live = _LiveBytes(weights)
    with torch.no_grad(), torch.device("meta"), live, _FusedAttention():
        returned = call()
    return live.peak, returned


class _LiveBytes(TorchDispatchMode):
    """Counts each memory once, from the operation that makes it until the last tensor in it is gone."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}
        self._of_weights = {_memory(weight) for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return False  # a mask is asked whether it may be left out: it is counted
        returned = func(*args, **(kwargs or {}))
        for leaf in (returned,) if isinstance(returned, torch.Tensor) else tree_leaves(returned):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self._note(leaf)
        return returned

    def _note(self, tensor: torch.Tensor) -> None:
        key = _memory(tensor)
        if key in self._of_weights or key in self._sizes:
            return
        storage = tensor.untyped_storage()
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """`query` is [..., heads, length, dim]; the output lies in memory as the kernels leave it, heads after length."""
    *batch, heads, length, _dim = query.shape if query.ndim > 2 else (1, *query.shape)
    output = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-3, -2)
    return output if query.ndim > 2 else output[0]
