"""Components without weights: the right class and configuration, parameters on the meta device.

A stage puts a skeleton where another stage holds the weights, so that the pipeline finds every
attribute it reads (scale factors, latent statistics, dtypes) exactly as with the real component.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
import transformers
from diffusers import ModelMixin

from deployments.weights.containers import is_container, member_class, member_folders, members
from deployments.weights.load import base_reading_replaced, read_tensors

HALF_DTYPES = (torch.float16, torch.bfloat16)


def skeleton(
    cls: type[torch.nn.Module],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    variant: str | None = None,
) -> Any:
    """The component of `folder` without its weights; it reports `device` as its own.

    Persistent buffers (statistics of latents, of batch norms) are a few bytes and are read for real.
    """
    module = cast_like_from_pretrained(build_from_config(cls, folder), dtype)
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
    module.__dict__["meta_twin"] = _meta_twin_maker(module, cls, folder, dtype)
    return module.eval()


def build_from_config(cls: Any, folder: Path, meta_buffers: bool = False) -> Any:
    """The model as from_pretrained would construct it, before any weight is read."""
    if is_container(cls):
        return cls([build_from_config(member_class(each), each, meta_buffers) for each in member_folders(folder)])
    with accelerate.init_empty_weights(include_buffers=meta_buffers):
        if issubclass(cls, ModelMixin):
            return cls.from_config(cls.load_config(folder))
        return _build_transformers(cast(type[transformers.PreTrainedModel], cls), folder)


def _build_transformers(cls: type[transformers.PreTrainedModel], folder: Path) -> Any:
    def construct(_read: Any, klass: Any, path: Any, /, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        return klass(config or klass.config_class.from_pretrained(path))

    with base_reading_replaced(construct):
        return cls.from_pretrained(folder)


def cast_like_from_pretrained(module: Any, dtype: torch.dtype | None) -> Any:
    """Parameters and buffers in the dtypes that from_pretrained(torch_dtype=dtype) leaves them in."""
    if dtype is None:
        return module
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or [])
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


def _meta_twin_maker(
    module: torch.nn.Module, cls: type[torch.nn.Module], folder: Path, dtype: torch.dtype | None
) -> Callable[[bool], Any]:
    """A function that returns a copy wholly on the meta device, for the shapes of what a call would return."""
    made: list[Any] = []

    def meta_twin(with_switches: bool = False) -> Any:
        if not made:
            twin = cast_like_from_pretrained(build_from_config(cls, folder, meta_buffers=True), dtype)
            graft(module, twin)
            made.append(twin.to("meta").eval())
        for source, target in zip(module.modules(), made[0].modules(), strict=True):
            _copy_dtypes(source, target)
            if with_switches:
                _copy_switches(source, target)
        return made[0]

    return meta_twin


def twin_of(module: torch.nn.Module, cls: type[torch.nn.Module], folder: Path) -> Any:
    """A real component's copy on the meta device, for the shapes of what it would return."""
    made = build_from_config(cls, folder, meta_buffers=True)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    graft(module, made)
    return cast_like_from_pretrained(made, dtype).to("meta").eval()


def graft(source: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Gives a twin what was put into the source after it was made (IP-Adapters), on the meta device."""
    if hasattr(source, "_internal_dict"):
        twin._internal_dict = source._internal_dict  # settings that a loader changed
    for name, child in source.named_children():
        other = twin._modules.get(name)
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


def _copy_dtypes(source: torch.nn.Module, target: torch.nn.Module) -> None:
    for name, parameter in source._parameters.items():
        other = target._parameters.get(name)
        if parameter is not None and other is not None and other.dtype != parameter.dtype:
            other.data = other.data.to(parameter.dtype)


def _copy_switches(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Run-time switches such as tiling and its sizes."""
    for name, value in source.__dict__.items():
        if not name.startswith("_") and isinstance(value, bool | int | float | str | tuple | type(None)):
            target.__dict__[name] = value
