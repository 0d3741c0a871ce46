"""The memory that a call needs besides the weights, counted on the meta device: no number is computed.

Counted are the bytes of all tensors that live at a time. Attention counts as the fused kernels that devices have.
What allocators round up and what cuDNN and cuBLAS take for themselves is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def peak_of(call: Callable[[], Any], held: Iterable[torch.Tensor] = ()) -> tuple[int, Any]:
    """The most bytes that tensors made by `call` hold at a time, its result among them; and the result.

    Counted are those on the meta device. `held` are there before: weights and inputs, which do not count. Raises what
    the call raises, such as where it reads a number.
    """
    counted = _LiveBytes(held)
    with torch.device("meta"), _FusedAttention(), counted:
        result = call()
    return counted.peak, result


def peak_bytes(call: Callable[[], Any], held: Iterable[torch.Tensor] = ()) -> int:
    """The same without the result."""
    return peak_of(call, held)[0]


def decode_bytes(autoencoder: Any, latents: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes for `decode` of latents of that shape by an autoencoder that is on the meta device.

    Its switches count: with `use_tiling` it is the peak of the tiled decoding.
    """
    given = torch.empty(latents, dtype=dtype, device="meta")
    return peak_bytes(lambda: autoencoder.decode(given), [*tensors_of(autoencoder), given])


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


class _LiveBytes(TorchDispatchMode):
    """Notes each storage when it is made and when the last tensor of it is gone."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._held = {_key(tensor) for tensor in held}
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return False  # a mask is asked whether it may be left out: it is counted
        output = func(*args, **(kwargs or {}))
        for leaf in (output,) if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self._note(leaf)
        return output

    def _note(self, tensor: torch.Tensor) -> None:
        key = _key(tensor)
        if key in self._held or key in self._live:
            return
        storage = tensor.untyped_storage()
        self._live[key] = storage.nbytes()
        self._now += self._live[key]
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


class _FusedAttention(TorchFunctionMode):
    """On the meta device attention would be made of matrices that no fused kernel makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention_output(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """[..., L, D of the values], in the order of memory in which fused kernels leave it."""
    shape = (*query.shape[:-1], value.shape[-1])
    if len(shape) != 4:
        return query.new_empty(shape)
    return query.new_empty((shape[0], shape[2], shape[1], shape[3])).transpose(1, 2)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
