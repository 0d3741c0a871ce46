"""The attention modules of a component: how each is given a kernel, and what its calls look like.

A module whose processor asks diffusers' dispatcher gets a backend's name in that processor; a module that calls torch's
`scaled_dot_product_attention` itself has that one call redirected while its forward runs.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch.overrides import TorchFunctionMode

from deployments.accelerations.attention_kernels import BackendKernel
from deployments.accelerations.attention_rules import COMPUTE_DTYPES

# What modules call the projection of their queries, that of queries, keys and values in one, and their head counts.
QUERY = ("to_q", "q_proj", "query", "q", "wq", "to_q_proj", "q_linear", "linear_q")
FUSED = ("to_qkv", "qkv", "qkv_proj", "wqkv", "Wqkv", "in_proj")
NUMS_OF_HEADS = ("heads", "num_heads", "n_heads", "num_attention_heads", "nheads", "n_head")
HEAD_DIMS = ("dim_head", "head_dim", "attention_head_dim", "dim_heads", "d_head")
OVER_PIXELS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)

Route = Callable[[torch.nn.Module, BackendKernel], None]


def attention_modules(component: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    known = (Attention, MochiAttention, AttentionModuleMixin)
    for path, module in component.named_modules():
        if isinstance(module, known) or find_route(module) is not None:
            yield path, module


def find_route(module: torch.nn.Module) -> Route | None:
    """How a module is given a backend; None: it computes attention in a way that has none."""
    processor = getattr(module, "processor", None)
    for holder in (processor, module):
        # Some processors build masks that one backend only understands, and refuse all others.
        if hasattr(holder, "_attention_backend"):
            return None if hasattr(holder, "_SUPPORTED_BACKENDS") else _name_backend
    if _calls_attention(processor) or _calls_attention(module):
        return _redirect_forward
    return None


def _calls_attention(holder: Any) -> bool:
    functions = [getattr(type(holder), name, None) for name in ("__call__", "forward")]
    codes = [getattr(inspect.unwrap(function), "__code__", None) for function in functions if function]
    names = {name for code in codes if code is not None for name in code.co_names}
    return bool(names & {"scaled_dot_product_attention", "dispatch_attention_fn"})


def _name_backend(module: torch.nn.Module, kernel: BackendKernel) -> None:
    holder: Any = module
    if hasattr(getattr(module, "processor", None), "_attention_backend"):
        holder = copy.copy(module.processor)  # modules may share one
        module.processor = holder
    holder._attention_backend = kernel.dispatcher_name()


def _redirect_forward(module: torch.nn.Module, kernel: BackendKernel) -> None:
    forward = module.forward
    redirection = _RedirectedAttention(kernel)

    @functools.wraps(forward)
    def redirected_forward(*args: Any, **kwargs: Any) -> Any:
        with redirection:
            return forward(*args, **kwargs)

    module.forward = redirected_forward


class _RedirectedAttention(TorchFunctionMode):
    """Within it, and in this thread only, torch's attention function is the kernel."""

    def __init__(self, kernel: BackendKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,  # [B, H, S, D], or [B, S, D] for one head
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        has_heads = query.ndim == 4
        heads_last = [x.transpose(1, 2) if has_heads else x.unsqueeze(2) for x in (query, key, value)]
        if not has_heads:  # a mask too is one of a head
            args = (_with_heads(args[0]), *args[1:]) if args else args
            kwargs = kwargs | {name: _with_heads(kwargs[name]) for name in ("attn_mask",) if name in kwargs}
        output: torch.Tensor = self.kernel.function(*heads_last, *args, **kwargs)
        return output.transpose(1, 2) if has_heads else output.squeeze(2)


def _with_heads(mask: Any) -> Any:
    return mask.unsqueeze(1) if isinstance(mask, torch.Tensor) and mask.ndim == 3 else mask


def floating_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """That in which the module computes; of an attention module, that of its queries' projection."""
    projection = _projection(module, QUERY) or _projection(module, FUSED)
    parameters = (*projection.parameters(), *module.parameters()) if projection is not None else module.parameters()
    return next((p.dtype for p in parameters if p.dtype in COMPUTE_DTYPES.values()), None)


def head_dim(module: torch.nn.Module) -> int | None:
    """Numbers per head of its queries: by its projection and its number of heads, or as it says; None: it does not."""
    query, fused = _projection(module, QUERY), _projection(module, FUSED)
    width = _attribute(query, ("out_features", "out_channels"))
    if width is None and fused is not None:
        of_three = _attribute(fused, ("out_features", "out_channels"))
        width = of_three // 3 if of_three is not None else None
    heads, said = _attribute(module, NUMS_OF_HEADS), _attribute(module, HEAD_DIMS)
    if width is not None and heads is not None:
        return width // heads
    if said is None and isinstance(query or fused, OVER_PIXELS):
        return width  # those of autoencoders have one head
    return said


def _projection(module: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((projection for projection in found if isinstance(projection, torch.nn.Module)), None)


def _attribute(module: torch.nn.Module | None, names: tuple[str, ...]) -> int | None:
    """The first of these that is a positive number."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)
