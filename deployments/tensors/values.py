"""Trees of values as pipelines pass them about: walked, mapped, and described without their numbers."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

PLAIN: tuple[type, ...] = (bool, int, float, str, bytes, type(None))
LIBRARIES = ("diffusers.", "transformers.")
LARGEST_KEPT = 65_536  # elements of an integer tensor (ids, masks) that a description keeps as numbers


@dataclass(frozen=True)
class MissingTensor:
    """Stands for a tensor whose numbers live in another stage."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_stage_device: bool = True


@dataclass(frozen=True)
class Opaque:
    """Stands for an object that never leaves its process, such as a key-value cache."""

    type_name: str


class Anything:
    """Answers every use of an Opaque object with another Anything, so code that only passes it along works."""

    def __getattr__(self, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Anything:
        return Anything()

    def __iter__(self) -> Iterator[Any]:
        return iter(())


LEAF_TYPES = frozenset({Anything, torch.Tensor, torch.dtype, torch.Size, str, bytes, int, float, bool, type(None)})


def is_output(value: Any) -> bool:
    """An output class of diffusers or transformers: a mapping that is also read like a tuple."""
    return hasattr(value, "to_tuple") and hasattr(value, "items")


def output_fields(output: Any) -> list[str]:
    """All of them: an output class leaves those that are None out of its keys, but asks for them when it is made."""
    declared = (field.name for field in dataclasses.fields(output)) if dataclasses.is_dataclass(output) else ()
    return list(dict.fromkeys([*declared, *output.keys()]))


def rebuilt_output(cls: Any, fields: Mapping[str, Any]) -> Any:
    """An output of the class, which reads a lone field as the fields themselves where its own constructor is used."""
    output = cls.__new__(cls)
    OrderedDict.__init__(output)
    for name, value in fields.items():
        if value is not None:
            OrderedDict.__setitem__(output, name, value)
        object.__setattr__(output, name, value)
    return output


def is_record(value: Any) -> bool:
    """A small object of a library that holds tensors as attributes, such as a posterior distribution."""
    return is_record_class(type(value))


def is_record_class(cls: type) -> bool:
    """Posterior distributions, and the momentum that guiders keep from step to step."""
    return cls.__module__.startswith(LIBRARIES) and cls.__name__.endswith(("Distribution", "MomentumBuffer"))


def parts(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """The children of a container and the function that rebuilds it from them; None for a leaf."""
    if type(value) in LEAF_TYPES:  # most values, seen at every step: without the questions below
        return None
    if is_output(value):
        names = output_fields(value)
        values = [getattr(value, name) for name in names]
        return values, lambda c: rebuilt_output(type(value), dict(zip(names, c, strict=True)))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(value), lambda c: type(value)(*c)
    if isinstance(value, tuple | list):
        kind = tuple if isinstance(value, tuple) else list
        return list(value), lambda c: kind(c)
    if isinstance(value, dict | UserDict):
        names = list(value.keys())
        mapping: Any = dict if isinstance(value, dict) else type(value)
        return [value[n] for n in names], lambda c: mapping(dict(zip(names, c, strict=True)))
    if is_record(value):
        names = list(vars(value))

        def rebuild(children: list[Any]) -> Any:
            copy = object.__new__(type(value))
            copy.__dict__.update(zip(names, children, strict=True))
            return copy

        return [vars(value)[n] for n in names], rebuild
    return None


def map_values(function: Callable[[Any], Any], value: Any) -> Any:
    """The same tree with `function` applied to every leaf."""
    opened = parts(value)
    if opened is None:
        return function(value)
    children, rebuild = opened
    return rebuild([map_values(function, child) for child in children])


def copied(value: Any) -> Any:
    """A copy that shares no memory with the value, in whatever containers its parts lie.

    What lies in it twice is one object in the copy too. Objects that no message may carry (caches) stay themselves.
    """
    return _copied(value, {})


def _copied(value: Any, known: dict[int, Any]) -> Any:
    if id(value) not in known:  # the value holds its parts, so that no other object gets one's id meanwhile
        opened = parts(value)
        if opened is None:
            known[id(value)] = _copied_leaf(value)
        else:
            children, rebuild = opened
            known[id(value)] = rebuild([_copied(child, known) for child in children])
    return known[id(value)]


def _copied_leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    return value.copy() if isinstance(value, np.ndarray | Image.Image) else value


def leaves(value: Any) -> Iterator[Any]:
    """Every leaf of the tree, in order."""
    opened = parts(value)
    if opened is None:
        yield value
    else:
        for child in opened[0]:
            yield from leaves(child)


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def is_meta(value: Any) -> bool:
    """Whether any tensor of the tree has a shape but no numbers."""
    return any(t.device.type == "meta" for t in tensors(value))


def has_gradients(value: Any) -> bool:
    """Whether it is recorded now what becomes of a tensor of the tree, to differentiate by it later."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors(value))


def has_nan(value: Any) -> bool:
    return any(t.is_floating_point() and t.device.type != "meta" and bool(torch.isnan(t).any()) for t in tensors(value))


def to_meta(value: Any) -> Any:
    """The tree with meta tensors in place of real ones and without generators, which have no meta device."""

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to("meta")
        return None if isinstance(x, torch.Generator) else x

    return map_values(leaf, value)


PORTABLE: tuple[type, ...] = (
    *PLAIN,
    torch.Tensor,
    torch.Generator,
    torch.dtype,
    torch.device,
    torch.Size,
    slice,
    np.ndarray,
    np.generic,
    Image.Image,
    MissingTensor,
    Opaque,
)


def without_opaque(value: Any) -> Any:
    """The tree with Opaque for objects that never leave their process."""
    return map_values(lambda x: x if isinstance(x, PORTABLE) else Opaque(type(x).__name__), value)


def with_anything(value: Any) -> Any:
    """The tree with Anything for what was Opaque to the sender."""
    return map_values(lambda x: Anything() if isinstance(x, Opaque) else x, value)


def describe(value: Any) -> Any:
    """The tree with MissingTensor for numbers that only a real stage has; of ids, masks and plain values a copy."""

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            if x.is_floating_point() or x.is_complex() or x.is_meta or x.numel() > LARGEST_KEPT:
                return MissingTensor(tuple(x.shape), x.dtype, x.device.type != "cpu")
            return _copied_leaf(x)
        if isinstance(x, torch.Generator) or not isinstance(x, PORTABLE):
            return Opaque(type(x).__name__)
        return _copied_leaf(x)

    return map_values(leaf, value)


def fill(description: Any, device: torch.device) -> Any:
    """A tree of the described shapes with NaN for every missing number: what is computed from it shows it.

    It is the receiver's own: what it changes of it changes nothing in the description.
    """

    def leaf(x: Any) -> Any:
        if isinstance(x, MissingTensor):
            return _without_numbers(x, device)
        return Anything() if isinstance(x, Opaque) else _copied_leaf(x)

    return map_values(leaf, description)


def with_nan(value: Any, device: torch.device) -> Any:
    """The tree with NaN for the numbers that are missing; what is there stays itself."""
    return map_values(lambda x: _without_numbers(x, device) if isinstance(x, MissingTensor) else x, value)


def _without_numbers(missing: MissingTensor, device: torch.device) -> torch.Tensor:
    where = device if missing.on_stage_device else torch.device("cpu")
    number = float("nan") if missing.dtype.is_floating_point or missing.dtype.is_complex else 0
    return torch.full(missing.shape, number, dtype=missing.dtype, device=where)


def fill_meta(description: Any) -> Any:
    """A tree of meta tensors of the described shapes."""

    def leaf(x: Any) -> Any:
        if isinstance(x, MissingTensor):
            return torch.empty(x.shape, dtype=x.dtype, device="meta")
        if isinstance(x, torch.Tensor):
            return x.to("meta")
        return Anything() if isinstance(x, Opaque) else x

    return map_values(leaf, description)


def same_description(a: Any, b: Any) -> bool:
    """Whether two descriptions agree in structure, shapes and kept values."""
    opened_a, opened_b = parts(a), parts(b)
    if opened_a is not None and opened_b is not None:
        return (
            type(a) is type(b)
            and len(opened_a[0]) == len(opened_b[0])
            and (not hasattr(a, "keys") or list(a.keys()) == list(b.keys()))
            and all(same_description(x, y) for x, y in zip(opened_a[0], opened_b[0], strict=True))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and bool(np.array_equal(a, b))
    return a is b or bool(a == b)


def shape_key(value: Any) -> str:
    """A text that is equal for trees of equal structure, shapes and plain values."""

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return tuple(x.shape), str(x.dtype)
        return x if isinstance(x, PLAIN) else type(x).__name__

    return repr(map_values(leaf, value))
