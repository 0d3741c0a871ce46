"""Tensors that are handed out before they are made, and that tell when their numbers are used.

A promise knows its shape, dtype and device. What only looks at a part of it, or casts it, is a promise too. Any other
operation uses its numbers: they are made then, if they were not made before, and the operation gets a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deployments.errors import PassesApartError
from deployments.tensors.values import MissingTensor, leaves, map_values, parts, tensors

# Answered by a promise that is not kept yet.
DESCRIBING = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")
    ),
    *(getattr(torch.Tensor, name).__get__ for name in ("is_meta", "is_cuda", "is_mps", "is_xpu", "requires_grad")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "nelement", "ndimension", "element_size")),
    *(getattr(torch.Tensor, name) for name in ("__len__", "is_floating_point", "is_complex", "get_device")),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
CASTING = {getattr(torch.Tensor, name) for name in ("to", "float", "double", "half", "bfloat16")}
# What they make is known but for its numbers, and follows when these are there. No copies: what is kept has numbers.
REARRANGING = CASTING | {
    getattr(module, name)
    for module in (torch.Tensor, torch)
    for name in (
        *("__getitem__", "view", "reshape", "flatten", "unflatten", "contiguous", "detach"),
        *("squeeze", "unsqueeze", "permute", "transpose", "swapaxes", "movedim", "expand"),
        *("narrow", "select", "chunk", "split", "tensor_split", "unbind"),
    )
    if hasattr(module, name)
}
PLAIN_ARGUMENTS = (int, float, str, slice, type(None), type(...), torch.dtype, torch.device, torch.memory_format)


class Source:
    """What several promises come from: the output of one call."""

    def __init__(self, make: Callable[[], None] | None = None) -> None:
        """`make` is called where numbers are used before `keep` was; it calls `keep`, or raises."""
        self.is_used = False
        self.is_open = True  # what looks at a part of a promise is a promise
        self._make = make
        self._to_keep: list[Promise] = []  # those of the output, in its order
        self._derived: list[Callable[[], None]] = []  # in the order in which they were asked for

    def promised(self, description: Any, device: torch.device) -> Any:
        """The output as promises; `description` is one of `describe`, with numbers of tensors only."""

        def leaf(missing: Any) -> Any:
            if not isinstance(missing, MissingTensor):
                return missing
            where = device if missing.on_stage_device else torch.device("cpu")
            self._to_keep.append(Promise(self, missing.shape, missing.dtype, where))
            return self._to_keep[-1]

        return map_values(leaf, description)

    def watched(self, output: Any) -> Any:
        """An output that is there, as promises that are kept."""
        return map_values(lambda leaf: self._kept_promise(leaf) if isinstance(leaf, torch.Tensor) else leaf, output)

    def keep(self, output: Any) -> None:
        """The output was made. Raises PassesApartError where it is another than was promised."""
        made, to_keep, derived = tensors(output), self._to_keep, self._derived
        self._to_keep, self._derived, self._make, self.is_open = [], [], None, False
        if len(made) != len(to_keep) or not all(map(fits, to_keep, made)):
            raise PassesApartError("a denoiser's output has another shape than its arguments gave it before")
        for promise, tensor in zip(to_keep, made, strict=True):
            promise.value = tensor
        for derive in derived:  # before anybody writes into what they are parts of
            derive()

    def close(self) -> None:
        """Nobody asks any more whether it is used."""
        self.is_open = False

    def value_of(self, promise: Promise) -> torch.Tensor:
        self.is_used = True
        if promise.value is None:
            assert self._make is not None
            self._make()
        assert promise.value is not None
        return promise.value

    def derive(self, function: Callable[..., Any], promise: Promise, args: Any, kwargs: Any) -> Any:
        """What a function of REARRANGING makes of a promise, as promises."""
        if promise.value is not None:
            return self.watched(function(promise.value, *args, **kwargs))
        meta = torch.empty(promise.shape, dtype=promise.dtype, device="meta")
        if function is torch.Tensor.to:  # a device too, perhaps
            shapes = meta.to(torch._C._nn._parse_to(*args, **kwargs)[1] or meta.dtype)
        else:
            shapes = function(meta, *args, **kwargs)
        if shapes is meta and function in CASTING:  # to what it is
            return promise
        derived: list[Promise] = []

        def leaf(like: torch.Tensor) -> Promise:
            derived.append(Promise(self, like.shape, like.dtype, promise.device))
            return derived[-1]

        def make() -> None:
            made = tensors(function(promise.value, *args, **kwargs))
            for each, tensor in zip(derived, made, strict=True):
                each.value = tensor

        self._derived.append(make)
        return map_values(leaf, shapes)

    def _kept_promise(self, tensor: torch.Tensor) -> Promise:
        return Promise(self, tensor.shape, tensor.dtype, tensor.device, tensor)


class Promise(torch.Tensor):
    """One tensor of a Source. It never reaches a kernel: operations get `value`."""

    source: Source
    value: torch.Tensor | None  # None: not made yet

    @staticmethod
    def __new__(
        cls: type[Promise],
        source: Source,
        shape: Any,
        dtype: torch.dtype,
        device: torch.device,
        value: torch.Tensor | None = None,
    ) -> Promise:
        made: Promise = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.source, made.value = source, value
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Promise) and first.value is None and func in DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(first, Promise) and first.source.is_open:
            if func in DESCRIBING:
                return func(first.value, *args[1:], **kwargs)
            if func in REARRANGING and is_rearranging(first, func, args[1:], kwargs):
                return first.source.derive(func, first, args[1:], kwargs)
        args, kwargs = plain_tensors((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what reaches torch's kernels without being seen by `__torch_function__`, such as code in C++."""
        args, kwargs = plain_tensors((args, kwargs or {}))
        return func(*args, **kwargs)


def plain_tensors(value: Any) -> Any:
    """The tree with the tensors in place of their promises, which are used; the same object where it has none."""
    if isinstance(value, Promise):
        return value.source.value_of(value)
    opened = parts(value)
    if opened is None:
        return value
    children, rebuild = opened
    plain = [plain_tensors(child) for child in children]
    return value if all(a is b for a, b in zip(children, plain, strict=True)) else rebuild(plain)


def is_rearranging(promise: Promise, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function of REARRANGING makes nothing but promises on the same device with these arguments."""
    if not all(isinstance(leaf, PLAIN_ARGUMENTS) for leaf in leaves((args, kwargs))):
        return False
    if function is not torch.Tensor.to:
        return True
    if "copy" in kwargs or any(isinstance(each, bool) for each in args):
        return False
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    return device is None or (device.type == promise.device.type and device.index in (None, promise.device.index))


def fits(promise: Promise, tensor: torch.Tensor) -> bool:
    return promise.shape == tensor.shape and promise.dtype == tensor.dtype
