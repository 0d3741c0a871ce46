"""Components without weights: the right class and configuration, parameters on the meta device.

A stage puts a skeleton where another stage holds the weights, so that the pipeline finds every
attribute it reads (scale factors, latent statistics, dtypes) exactly as with the real component.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
import transformers
from diffusers import ModelMixin

from deployments.weights.containers import is_container, member_class, member_folders, members
from deployments.weights.load import read_tensors
from deployments.weights.reading.transformers_models import base_reading_replaced

# While a model without weights is made, every new parameter of the process goes to the meta device; held by whoever
# makes one, or puts new layers into a model.
BUILDING = threading.RLock()
HALF_DTYPES = (torch.float16, torch.bfloat16)


def skeleton(
    cls: type[torch.nn.Module],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    variant: str | None = None,
    read_buffers: bool = True,
) -> Any:
    """The component of `folder` without its weights; it reports `device` as its own.

    Persistent buffers (statistics of latents, of batch norms) are a few bytes and are read for real, unless
    `read_buffers` is false: only shapes count then, and the weights' files need not be at hand.
    """
    module = cast_like_from_pretrained(build_from_config(cls, folder), dtype)
    if read_buffers:
        _read_buffers(module, cls, folder, variant)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Pipelines move components about; nothing is here to be moved, only a change of dtype means something.
        wanted = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        return cls.to(self, dtype=wanted) if wanted else self

    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    members = {
        "device": property(lambda self: device),
        "to": to,
        "cuda": stay,
        "cpu": stay,
        "__module__": cls.__module__,
    }
    module.__class__ = type(cls.__name__, (cls,), members)
    module.__dict__["meta_twin"] = meta_twin_maker(module, cls, folder, dtype)
    return module.eval()


def build_from_config(cls: Any, folder: Path, meta_buffers: bool = False) -> Any:
    """The model as from_pretrained would construct it, before any weight is read."""
    if is_container(cls):
        return cls([build_from_config(member_class(each), each, meta_buffers) for each in member_folders(folder)])
    with BUILDING, accelerate.init_empty_weights(include_buffers=meta_buffers):
        if issubclass(cls, ModelMixin):
            return cls.from_config(cls.load_config(folder))
        return _build_transformers(cast(type[transformers.PreTrainedModel], cls), folder)


def _build_transformers(cls: type[transformers.PreTrainedModel], folder: Path) -> Any:
    def construct(_read: Any, klass: Any, path: Any, /, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        return klass(config or klass.config_class.from_pretrained(path))

    with base_reading_replaced(construct), _meta_left_as_it_is():
        return cls.from_pretrained(folder)


@contextmanager
def _meta_left_as_it_is() -> Iterator[None]:
    """Random numbers for tensors that hold none take half of the time in which a model is made."""
    base: Any = transformers.PreTrainedModel
    initialize = base.__dict__["_initialize_weights"]

    def initialize_what_is_real(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if not all(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
            initialize(self, module, *args, **kwargs)

    base._initialize_weights = initialize_what_is_real
    try:
        yield
    finally:
        base._initialize_weights = initialize


def cast_like_from_pretrained(module: Any, dtype: torch.dtype | None) -> Any:
    """Parameters and buffers in the dtypes that from_pretrained(torch_dtype=dtype) leaves them in."""
    if dtype is None:
        return module
    # transformers keeps these for the sake of float16 alone, diffusers in both.
    is_kept = isinstance(module, ModelMixin) or dtype == torch.float16
    kept = set((is_kept and getattr(module, "_keep_in_fp32_modules", None)) or [])
    kept |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or [])
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            keeps_fp32 = dtype in HALF_DTYPES and any(k in name.split(".") for k in kept)
            tensor.data = tensor.data.to(torch.float32 if keeps_fp32 else dtype)
    return module


def _read_buffers(module: torch.nn.Module, cls: type[torch.nn.Module], folder: Path, variant: str | None) -> None:
    if is_container(cls):
        for member, member_folder in zip(members(module), member_folders(folder), strict=True):
            _read_buffers(member, type(member), member_folder, variant)
        return
    # What state_dict names beside the parameters is stored with the weights; other buffers are computed.
    stored = module.state_dict().keys() - dict(module.named_parameters()).keys()
    if stored:
        buffers = dict(module.named_buffers())
        for name, tensor in read_tensors(cls, folder, stored, variant).items():
            buffers[name].data.copy_(tensor)


def meta_twin_maker(
    module: torch.nn.Module, cls: type[torch.nn.Module], folder: Path, dtype: torch.dtype | None
) -> Callable[..., Any]:
    """A function that returns a copy wholly on the meta device, for the shapes of what a call would return.

    It has the dtypes, and if asked the switches, of the component as one request has it; else those of a skeleton, or
    of what is real as it is now.
    """
    is_real = any(not parameter.is_meta for parameter in module.parameters())
    made: list[torch.nn.Module] = []
    at_first: dict[str, Switches] = {}

    def meta_twin(with_switches: bool = False, own: torch.nn.Module | None = None) -> Any:
        if not made:
            twin = cast_like_from_pretrained(build_from_config(cls, folder, meta_buffers=True), dtype)
            graft(module, twin)
            made.append(twin.to("meta").eval())
            at_first.update({path: _switches(part) for path, part in twin.named_modules()})
        followed = own if own is not None else None if is_real else module
        parts = dict(followed.named_modules()) if followed is not None else {}
        for path, target in made[0].named_modules():
            found = _switches(parts[path]) if path in parts else at_first[path]
            _set_dtypes(target, found.dtypes)
            vars(target).update(found.values if with_switches else at_first[path].values)
        return made[0]

    return meta_twin


@dataclass(frozen=True)
class Switches:
    """What may be changed of one module at run time: the dtypes of its parameters, and values such as tile sizes."""

    dtypes: dict[str, torch.dtype]
    values: dict[str, Any]


def _switches(module: torch.nn.Module) -> Switches:
    dtypes = {name: p.dtype for name, p in module._parameters.items() if p is not None and p.is_floating_point()}
    values = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, bool | int | float | str | tuple | type(None))
    }
    return Switches(dtypes, values)


def _set_dtypes(module: torch.nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, parameter in module._parameters.items():
        wanted = dtypes.get(name)
        if parameter is not None and wanted is not None and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


def graft(source: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Gives a twin what was put into the source after it was made (IP-Adapters), on the meta device."""
    if hasattr(source, "_internal_dict"):
        twin._internal_dict = source._internal_dict  # settings that a loader changed
    layer: Any
    for name, layer in source.named_children():
        # A LoRA's layer returns what the layer in it does.
        child = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        other = twin._modules.get(name)
        if isinstance(child, torch.nn.Linear) and isinstance(other, torch.nn.Linear):
            continue  # quantised, or not: what it returns has the same shape
        if other is None or type(other).forward is not type(child).forward:
            setattr(twin, name, _on_meta(child))
        else:
            graft(child, other)


def _on_meta(module: torch.nn.Module) -> torch.nn.Module:
    """A copy without the numbers, which may be many."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = torch.nn.Parameter(empty, False) if isinstance(tensor, torch.nn.Parameter) else empty
    return copy.deepcopy(module, memo)
