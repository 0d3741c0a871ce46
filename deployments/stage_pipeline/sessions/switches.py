"""Casts and modes that a request's pipeline gives a component: to the request's own tensors and modules, never to the
shared ones.

A request that asks for `vae.to(torch.float32)` gets parameters of its own, which the shared module has around the
request's own calls only (`own_modules`). A cast back to what is shared is the shared tensor again, where no cast
between has rounded its numbers. Switches of a component that another process holds are sent with its calls.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from deployments.errors import NotSupportedError
from deployments.stage_pipeline.sessions.own_modules import ABSENT, OwnModules
from deployments.tensors.values import PLAIN, leaves

CASTS = frozenset({"to", "half", "float", "double", "bfloat16", "type", "requires_grad_"})
MODES = frozenset({"train", "eval"})
MOVES = frozenset({"cpu", "cuda", "xpu", "npu", "ipu", "mtia"})  # a component stays where its stage has it
ON_NUMBERS = frozenset({"load_state_dict", "to_empty", "share_memory"})  # they write into what all requests share
SETTING_METHODS = CASTS | MODES | MOVES | ON_NUMBERS

DTYPES = {"half": torch.float16, "float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16}

# What another process needs to set a switch: path of the module, table, name, value; of a tensor its casts and strides.
Switch = tuple[str, str | None, str, Any]


def set_on_own(own: OwnModules, module: torch.nn.Module, method: str, args: Any, kwargs: Any) -> None:
    """Calls a method of SETTING_METHODS on the request's own object of `module`.

    Raises NotSupportedError for one that writes into the weights themselves.
    """
    if method in ON_NUMBERS:
        raise NotSupportedError(f"{type(module).__name__}.{method} is called for one request, but others share it")
    if method == "to":
        args, kwargs = (), _without_device(*args, **kwargs)
    if method in MOVES or _changes_nothing(own.seen(module), method, args, kwargs):
        return
    if method in MODES:
        getattr(own.of(module), method)(*args, **kwargs)
    else:
        own.of(own.root)  # whose dtype is that of its parts
        _cast(own, own.of(module), method, args, kwargs)


def casts_of(value: Any) -> tuple[torch.dtype, ...] | None:
    """The dtypes to which a request's own tensor was cast, one after the other; None for what is no such tensor."""
    found: tuple[torch.dtype, ...] | None = getattr(value, "casts", None) if isinstance(value, torch.Tensor) else None
    return found


def switches_of(component: str, own: OwnModules) -> list[Switch]:
    """What the request changed, for the process that holds the component. Raises NotSupportedError."""
    paths = {part: path for path, part in own.root.named_modules()}
    return [_portable(component, paths[c.module], c.table, c.name, c.value) for c in own.changes()]


def set_switches(own: OwnModules, switches: Sequence[Switch]) -> None:
    """Sets in a request's own modules what it set in those of another process."""
    for path, table, name, value in switches:
        mine = own.of(own.root.get_submodule(path))
        if table is None:
            vars(mine)[name] = value
        else:
            entries = vars(mine)[table]
            entries[name] = _as_cast(entries[name], *value)
            own.has_casts = True


def _without_device(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of Module.to but for the device."""
    _, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    asked = {"dtype": dtype, "memory_format": memory_format}
    return {name: value for name, value in asked.items() if value is not None}


def _changes_nothing(module: torch.nn.Module, method: str, args: Any, kwargs: Any) -> bool:
    """Seen without own objects: pipelines ask at every call for what there is already."""
    if method in MODES:
        mode = method == "train" and (args[0] if args else kwargs.get("mode", True))
        return all(part.training == mode for part in module.modules())
    if method == "to" and not kwargs:
        return True
    dtype = DTYPES.get(method) or (kwargs["dtype"] if method == "to" and kwargs.keys() == {"dtype"} else None)
    tensors = [*module.parameters(), *module.buffers()] if dtype is not None else []
    return dtype is not None and all(t.dtype == dtype for t in tensors if t.is_floating_point() or t.is_complex())


def _cast(own: OwnModules, mine: torch.nn.Module, method: str, args: Any, kwargs: Any) -> None:
    tables = list(own.tensors_of(mine))
    aliases: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for entries, shared in tables:
        for name, tensor in entries.items():
            # Module.to exchanges what a parameter holds, and that of a shared one stays.
            if tensor is shared.get(name) and isinstance(tensor, torch.nn.Parameter):
                if id(tensor) not in aliases:
                    aliases[id(tensor)] = _alias(tensor)
                entries[name] = aliases[id(tensor)]
    before = [{name: (t.dtype, casts_of(t) or ()) for name, t in e.items() if t is not None} for e, _ in tables]
    own.has_casts = True
    try:
        getattr(mine, method)(*args, **kwargs)
    finally:
        for (entries, shared), had in zip(tables, before, strict=True):
            for name, tensor in entries.items():
                if tensor is not None and shared.get(name) is not None:
                    entries[name] = _settled(tensor, *had[name], shared[name])


def _alias(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Another parameter that holds the same numbers, where they are."""
    if type(parameter) is torch.nn.Parameter or not issubclass(type(parameter), torch.nn.Parameter):
        return torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
    alias: torch.nn.Parameter = copy.copy(parameter)  # a quantised one
    return alias


def _settled(
    tensor: torch.Tensor, dtype: torch.dtype, casts: tuple[torch.dtype, ...], shared: torch.Tensor
) -> torch.Tensor:
    """The shared tensor itself where the request's own one, of `dtype` until now, has come back to it."""
    if tensor.dtype != dtype:
        casts = (*casts, tensor.dtype)
    is_like_shared = (tensor.dtype, tensor.requires_grad) == (shared.dtype, shared.requires_grad)
    if is_like_shared and tensor.stride() == shared.stride() and all(_holds(c, shared.dtype) for c in casts):
        return shared
    setattr(tensor, "casts", casts)  # noqa: B010  (tensors have no such attribute of their own)
    return tensor


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of the other dtype is one of this too."""
    if dtype == other:
        return True
    if not (dtype.is_floating_point and other.is_floating_point):
        return False
    wide, narrow = torch.finfo(dtype), torch.finfo(other)
    return wide.eps <= narrow.eps and wide.max >= narrow.max and wide.tiny <= narrow.tiny


def _portable(component: str, path: str, table: str | None, name: str, value: Any) -> Switch:
    if (casts := casts_of(value)) is not None:
        return path, table, name, [list(casts), list(value.stride())]
    if table is None and value is not ABSENT and all(isinstance(leaf, PLAIN) for leaf in leaves(value)):
        return path, None, name, value
    where = ".".join(part for part in (component, path, name) if part)
    raise NotSupportedError(
        f"{where} is changed for one request, and another process holds {component}: "
        "such requests can only be served in one process (placement: one_stage)"
    )


def _as_cast(tensor: torch.Tensor, casts: Sequence[torch.dtype], stride: Sequence[int]) -> torch.Tensor:
    value = tensor.detach()
    for dtype in casts:
        value = value.to(dtype)
    if value.stride() != tuple(stride):
        value = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)
    if isinstance(tensor, torch.nn.Parameter):
        value = torch.nn.Parameter(value, tensor.requires_grad)
    setattr(value, "casts", tuple(casts))  # noqa: B010
    return value
