"""A component as one request sees it: everything passes through to the real one, but calls go to its stage's router."""

from __future__ import annotations

import functools
import inspect
import types
from contextlib import AbstractContextManager
from typing import Any, Protocol

import diffusers
import torch
import transformers
from diffusers import ModelMixin

from deployments.stage_pipeline.sessions.own_modules import OwnModules

COMPUTING_METHODS = frozenset({"forward", "encode", "decode", "generate", "get_text_features", "get_image_features"})
# Methods that change or ask for settings; they compute nothing that another stage would need.
SETTING_PREFIXES = [
    "enable_",
    "disable_",
    "set_",
    "clear_",
    "reset_",
    "fuse_",
    "unfuse_",
    "load_",
    "save_",
    "add_",
    "delete_",
    "use_",
    "init_",
    "from_",
    "get_input_emb",
    "get_output_emb",
    "attn_processors",
]
INHERITED = frozenset(
    name
    for base in (torch.nn.Module, ModelMixin, transformers.PreTrainedModel, diffusers.ConfigMixin)
    for name in dir(base)
)
# Pipelines reset caches of the denoiser at the end of every call, but it is shared by all requests.
IGNORED_ON_DENOISERS = frozenset({"_reset_stateful_cache"})
# Methods of any module through which nothing can be rewired; the others are those of the request's own modules.
ON_WEIGHTS = frozenset(
    {"parameters", "named_parameters", "buffers", "named_buffers", "num_parameters", "state_dict", "zero_grad"}
    | {"to", "cpu", "cuda", "half", "float", "double", "bfloat16", "eval", "train", "requires_grad_"}
)


class Router(Protocol):
    """Decides what the call of a component does in a stage; a session is one."""

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any: ...

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any: ...

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any: ...

    def cache_context(self, component: str, name: Any = None, **kwargs: Any) -> AbstractContextManager[None]: ...

    def own_modules_of(self, component: str) -> OwnModules: ...


@functools.cache
def is_computing_method(cls: Any, name: str) -> bool:
    """Whether calls of this method are worth recording: the usual ones, and those the model class itself brings."""
    if name in COMPUTING_METHODS:
        return True
    if name.startswith(("_", *SETTING_PREFIXES)) or name in INHERITED:
        return False
    attribute = inspect.getattr_static(cls, name, None)
    if not isinstance(attribute, types.FunctionType | classmethod | staticmethod):
        return False
    return any(
        name in base.__dict__
        for base in cls.__mro__
        if base.__module__.startswith(("diffusers.", "transformers.models.")) and "mixin" not in base.__name__.lower()
    )


class RoutedComponent:
    """Stands for `real` in the private pipeline of one request; isinstance, attributes and switches pass through."""

    def __init__(self, real: Any, name: str, router: Router, is_denoiser: bool) -> None:
        object.__setattr__(self, "_route", (real, name, router, is_denoiser))

    @property
    def __class__(self) -> Any:
        return type(object.__getattribute__(self, "_route")[0])

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise AttributeError("the class of a component cannot be changed by a request")

    def __getattr__(self, name: str) -> Any:
        real, component, router, is_denoiser = object.__getattribute__(self, "_route")
        if is_denoiser and name in IGNORED_ON_DENOISERS:
            return lambda *args, **kwargs: None
        if is_denoiser and name == "cache_context":
            return functools.partial(router.cache_context, component)
        value = getattr(real, name)
        cls: Any = type(real)
        if callable(value) and is_computing_method(cls, name):
            return functools.wraps(value)(functools.partial(self._call, name, value))
        return self._own(name, value) if is_denoiser else value

    def _own(self, name: str, value: Any) -> Any:
        """An attribute of a denoiser, of the request's own modules where these can be rewired through it."""
        real, component, router, *_ = object.__getattribute__(self, "_route")
        own = router.own_modules_of(component)
        if isinstance(value, torch.nn.Module):
            return own.of(value)
        is_method = isinstance(value, types.MethodType) and value.__self__ is real
        if name == "attn_processors" or (is_method and name not in ON_WEIGHTS):
            return getattr(own.of(real), name)
        return getattr(own.reading(real, name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        real, component, router, is_denoiser = object.__getattribute__(self, "_route")
        if name == "__class__":
            object.__setattr__(self, name, value)  # the property refuses it
        elif is_denoiser:
            setattr(router.own_modules_of(component).of(real), name, value)
        else:
            setattr(real, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("forward", object.__getattribute__(self, "_route")[0], *args, **kwargs)

    def _call(self, method: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        real, component, router, is_denoiser = object.__getattribute__(self, "_route")
        if not is_denoiser:
            return router.on_component_call(component, method, function, args, kwargs)
        if method == "forward":
            return router.on_denoiser_forward(component, real, args, kwargs)
        return router.on_denoiser_method(component, method, function, args, kwargs)
