"""A component as one request sees it: what it reads is the real one's, its calls go to its stage's router, and what it
changes is its own.

Parts of a component are seen in the same way, so that a call of `vqvae.quantize`, a hook on a layer of a text encoder
or the numbers of a parameter take the way of every other call. Its name is then that of a method with the path
before it: "quantize.forward", "parameter:embedding.weight".
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import diffusers
import torch
import transformers
from diffusers import ModelMixin

from deployments.stage_pipeline.sessions.own_modules import OwnModules
from deployments.stage_pipeline.sessions.parameter import RoutedParameter, numbers_of
from deployments.stage_pipeline.sessions.switches import SETTING_METHODS, set_on_own

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
PARAMETER = "parameter:"  # begins the name of the call that reads one
HOOKS = frozenset({"register_forward_hook", "register_forward_pre_hook"})
GIVE_A_PART = frozenset({"get_input_embeddings", "get_output_embeddings", "get_submodule"})
GIVE_TENSORS = frozenset({"parameters", "buffers", "named_parameters", "named_buffers"})
# Methods of any module through which nothing can be rewired; the others are those of the request's own modules.
READING = frozenset({"num_parameters", "state_dict", "get_memory_footprint", "zero_grad"})


class Router(Protocol):
    """Decides what the call of a component does in a stage; a session is one."""

    @property
    def device(self) -> torch.device: ...

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any: ...

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any: ...

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any: ...

    def cache_context(self, component: str, name: Any = None, **kwargs: Any) -> AbstractContextManager[None]: ...

    def on_hook(self, component: str, path: str, register: str, hook: Any, options: Any) -> Any: ...

    def own_modules_of(self, component: str) -> OwnModules: ...


def function_of(module: Any, method: str) -> Any:
    """What a routed call of this name calls; raises AttributeError where there is nothing of this name."""
    path, _, name = method.removeprefix(PARAMETER).rpartition(".")
    owner = module.get_submodule(path)
    if method.startswith(PARAMETER):
        return functools.partial(_read, owner, name)
    return owner if name == "forward" else getattr(owner, name)


def is_routed(module: Any, method: str) -> bool:
    """Whether calls of this name are routed: what another stage may ask for."""
    path, _, name = method.removeprefix(PARAMETER).rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return False
    if method.startswith(PARAMETER):
        return isinstance(getattr(owner, name, None), torch.Tensor)
    cls: Any = type(owner)
    return is_computing_method(cls, name)


def _read(owner: torch.nn.Module, name: str) -> torch.Tensor:
    tensor: torch.Tensor = getattr(owner, name)
    return tensor.detach().clone()  # all requests share the parameter itself


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
    """Stands for `real` in the private pipeline of one request; isinstance and attributes pass through.

    `path` leads from the component to the part of it that `real` is; empty for the component itself.
    """

    def __init__(self, real: Any, name: str, router: Router, is_denoiser: bool, path: str = "") -> None:
        object.__setattr__(self, "_route", (real, name, router, is_denoiser, path))

    @property
    def __class__(self) -> Any:
        return type(object.__getattribute__(self, "_route")[0])

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise AttributeError("the class of a component cannot be changed by a request")

    def __getattr__(self, name: str) -> Any:
        real, component, router, is_denoiser, _ = object.__getattribute__(self, "_route")
        if is_denoiser and name in IGNORED_ON_DENOISERS:
            return lambda *args, **kwargs: None
        if is_denoiser and name == "cache_context":
            return functools.partial(router.cache_context, component)
        if name == "device" and hasattr(type(real), "device"):
            return router.device  # also of one whose first half is on the meta device
        if not isinstance(real, torch.nn.Module):
            return self._seen(name, getattr(real, name))
        if name in HOOKS and not is_denoiser:
            return functools.partial(self._hook, name)
        if name in GIVE_TENSORS:
            return functools.partial(self._tensors, name)
        own = router.own_modules_of(component)
        if name in SETTING_METHODS and hasattr(torch.nn.Module, name):
            return functools.wraps(getattr(real, name))(functools.partial(self._set, name))
        return self._seen(name, self._denoisers(own, name) if is_denoiser else self._others(own, name))

    def _denoisers(self, own: OwnModules, name: str) -> Any:
        """An attribute of a denoiser, of the request's own modules where these can be rewired through it."""
        real = unrouted(self)
        value = getattr(own.reading(real, name), name)
        if own.is_own(real):
            return value
        if _computes(real, name, value):
            return getattr(real, name)
        if isinstance(value, torch.nn.Module):
            return own.of(value)
        if name == "attn_processors" or (_is_method_of(real, value) and name not in READING):
            return getattr(own.of(real), name)
        return value

    def _others(self, own: OwnModules, name: str) -> Any:
        """An attribute of another component: of the shared one until the request changes something.

        Its parts are the shared ones: around a call of theirs the request's changes are put into them.
        """
        real = unrouted(self)
        mine = own.seen(real)
        value = getattr(mine, name)
        if name in GIVE_A_PART or _computes(real, name, value):
            return getattr(real, name)
        if _is_method_of(mine, value) and name not in READING:
            return functools.wraps(value)(functools.partial(self._call_own, name))
        return own.shared(value) if isinstance(value, torch.nn.Module) else value

    def _call_own(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        real, component, router, *_ = object.__getattribute__(self, "_route")
        mine = router.own_modules_of(component).of(real)
        answer = getattr(mine, method)(*args, **kwargs)
        return self if answer is mine else answer

    def _set(self, method: str, /, *args: Any, **kwargs: Any) -> RoutedComponent:
        """As the methods that cast a module or set its mode, which answer the module itself."""
        real, component, router, *_ = object.__getattribute__(self, "_route")
        set_on_own(router.own_modules_of(component), real, method, args, kwargs)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        real, component, router, *_ = object.__getattribute__(self, "_route")
        if name == "__class__":
            object.__setattr__(self, name, value)  # the property refuses it
        elif isinstance(real, torch.nn.Module):
            setattr(router.own_modules_of(component).of(real), name, value)
        else:
            setattr(real, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call("forward", object.__getattribute__(self, "_route")[0], *args, **kwargs)

    def _call(self, method: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        real, component, router, is_denoiser, _ = object.__getattribute__(self, "_route")
        args, kwargs = tuple(map(numbers_of, args)), {name: numbers_of(value) for name, value in kwargs.items()}
        method = self._path_to(method)
        if not is_denoiser:
            return router.on_component_call(component, method, function, args, kwargs)
        if method == "forward":
            return router.on_denoiser_forward(component, real, args, kwargs)
        return router.on_denoiser_method(component, method, function, args, kwargs)

    def _path_to(self, name: str) -> str:
        path = object.__getattribute__(self, "_route")[4]
        return f"{path}.{name}" if path else name

    def _seen(self, name: str, value: Any) -> Any:
        """An attribute as the request sees it."""
        real, component, router, is_denoiser, path = object.__getattribute__(self, "_route")
        if isinstance(value, torch.nn.Module):
            is_itself = name == "_orig_mod"  # what torch.compile wraps
            return routed_part(value, component, router, is_denoiser, path if is_itself else self._path_to(name))
        if isinstance(value, torch.nn.Parameter) or (isinstance(value, torch.Tensor) and value.is_meta):
            return self._parameter(name, value)
        if name in GIVE_A_PART:
            return functools.wraps(value)(functools.partial(self._part_given_by, value))
        if _computes(real, name, value):
            return functools.wraps(value)(functools.partial(self._call, name, value))
        return value

    def _parameter(self, path: str, tensor: torch.Tensor) -> RoutedParameter:
        real, component, router, is_denoiser, _ = object.__getattribute__(self, "_route")
        function = function_of(real, PARAMETER + path)
        method = PARAMETER + self._path_to(path)
        route = router.on_denoiser_method if is_denoiser else router.on_component_call
        return RoutedParameter.of(tensor, router.device, lambda: route(component, method, function, (), {}))

    def _tensors(self, kind: str, prefix: str = "", recurse: bool = True, **kwargs: Any) -> Iterator[Any]:
        """As the method `kind` of a module; other tensors than parameters are everywhere as they are."""
        real, component, router, *_ = object.__getattribute__(self, "_route")
        real = router.own_modules_of(component).seen(real)
        if isinstance(prefix, bool):  # parameters(False)
            prefix, recurse = "", prefix
        named = getattr(real, kind if kind.startswith("named_") else f"named_{kind}")
        for path, tensor in named(recurse=recurse, **kwargs):
            seen = self._parameter(path, tensor) if "parameters" in kind or tensor.is_meta else tensor
            name = f"{prefix}.{path}" if prefix else path
            yield (name, seen) if kind.startswith("named_") else seen

    def _part_given_by(self, give: Any, /, *args: Any, **kwargs: Any) -> Any:
        real, part = object.__getattribute__(self, "_route")[0], give(*args, **kwargs)
        path = next((name for name, module in real.named_modules() if module is part), None)
        return self._seen(path, part) if path else part

    def _hook(self, register: str, hook: Any, **options: Any) -> Any:
        _, component, router, _, path = object.__getattribute__(self, "_route")
        return router.on_hook(component, path, register, hook, options)


def unrouted(component: RoutedComponent) -> Any:
    """The module that it stands for."""
    return object.__getattribute__(component, "_route")[0]


def _computes(module: Any, name: str, value: Any) -> bool:
    cls: Any = type(module)
    return callable(value) and is_computing_method(cls, name)


def _is_method_of(module: torch.nn.Module, value: Any) -> bool:
    return isinstance(value, types.MethodType) and value.__self__ is module


class RoutedContainer(RoutedComponent):
    """A list or dictionary of parts."""

    def __len__(self) -> int:
        return len(object.__getattribute__(self, "_route")[0])

    def __iter__(self) -> Iterator[Any]:
        real = object.__getattribute__(self, "_route")[0]
        return iter(real) if isinstance(real, torch.nn.ModuleDict) else (self[index] for index in range(len(real)))

    def __contains__(self, item: Any) -> bool:
        return item in object.__getattribute__(self, "_route")[0]

    def __getitem__(self, key: Any) -> Any:
        real, component, router, is_denoiser, _ = object.__getattribute__(self, "_route")
        if isinstance(key, slice):
            return [self[index] for index in range(len(real))[key]]
        own = router.own_modules_of(component)
        part = real[key] if is_denoiser else own.shared(own.seen(real)[key])
        return self._seen(str(range(len(real))[key] if isinstance(key, int) else key), part)

    def __setitem__(self, key: Any, value: Any) -> None:
        real, component, router, *_ = object.__getattribute__(self, "_route")
        mine: Any = router.own_modules_of(component).of(real)
        mine[key] = value


CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)


def routed_part(value: Any, component: str, router: Router, is_denoiser: bool, path: str) -> RoutedComponent:
    cls = RoutedContainer if isinstance(value, CONTAINERS) else RoutedComponent
    return cls(value, component, router, is_denoiser, path)
