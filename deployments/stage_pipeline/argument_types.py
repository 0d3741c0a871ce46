"""The types of a pipeline's arguments as data, read from the annotations of its call."""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Iterable
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.messages import ANY_VALUE, ValueType

OBJECT = ValueType("object")  # what has no form as JSON
NONE = ValueType("none")
PLAIN: dict[Any, ValueType] = {
    bool: ValueType("bool"),
    int: ValueType("int"),
    float: ValueType("float"),
    str: ValueType("str"),
    None: NONE,
    type(None): NONE,
    Any: ANY_VALUE,
    inspect.Parameter.empty: ANY_VALUE,
}
ROWS = (list, collections.abc.Iterable, collections.abc.Sequence, collections.abc.Collection)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def argument_types(pipeline_class: type, names: Iterable[str]) -> dict[str, ValueType]:
    """Of the parameters `names` of `__call__`."""
    inputs = call_inputs(pipeline_class)
    return {name: parameter_type(inputs[name]) for name in names}


def call_inputs(pipeline_class: type) -> dict[str, inspect.Parameter]:
    """The parameters of `__call__`, their annotations evaluated where that is possible."""
    call: Any = pipeline_class.__call__
    names = getattr(inspect.unwrap(call), "__globals__", {})
    return {
        name: parameter.replace(annotation=_evaluated(parameter.annotation, names))
        for name, parameter in inspect.signature(call).parameters.items()
    }


def as_taken(pipeline_class: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a tuple for each list of JSON where the annotation has only a tuple: pipelines add them up."""
    types = _types_of_class(pipeline_class)
    return {name: _as_taken(value, types.get(name, ANY_VALUE)) for name, value in arguments.items()}


def parameter_type(parameter: inspect.Parameter) -> ValueType:
    """A default is a value that the parameter may have, whatever its annotation says."""
    default, annotation = parameter.default, parameter.annotation
    if isinstance(annotation, str):  # its names cannot be found
        annotation = parameter.empty
    annotated = value_type(annotation)
    if default is parameter.empty or (annotated == ANY_VALUE and default is None):
        return annotated
    if annotated == ANY_VALUE:
        return type_of(default)
    return annotated if fits(default, annotated) else _union((annotated, type_of(default)))


def value_type(annotation: Any) -> ValueType:
    """A class that is not known is an object; what is no class at all may be anything."""
    if _is_plain(annotation):
        return PLAIN[annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return value_type(parts[0])
    if origin in (typing.Union, types.UnionType):
        # Text beside a path is the path of a file of this machine.
        return _union(value_type(part) for part in parts if not (part is str and any(map(_is_path, parts))))
    if origin is typing.Literal:
        return ValueType("choice", choices=parts)
    kind: Any = origin or annotation
    if kind is tuple:
        if not parts or parts[-1] is Ellipsis or len(parts) == 1:  # tuple[int] is meant as tuple[int, ...]
            return ValueType("row", (value_type(parts[0]) if parts else ANY_VALUE,))
        return ValueType("tuple", tuple(value_type(part) for part in parts))
    if kind in ROWS:
        return ValueType("list", (_union(value_type(part) for part in parts) if parts else ANY_VALUE,))
    if kind in MAPPINGS:
        return ValueType("dict", (value_type(parts[1]) if len(parts) == 2 else ANY_VALUE,))
    if not isinstance(kind, type):
        return OBJECT if kind is collections.abc.Callable else ANY_VALUE
    if issubclass(kind, Image.Image):
        return ValueType("picture")
    if issubclass(kind, Enum):
        return ValueType("choice", choices=tuple(member.value for member in kind))
    if is_record_class(kind):
        return _record(kind)
    return ValueType("tensor") if issubclass(kind, torch.Tensor | np.ndarray) or _is_tensor(kind) else OBJECT


def is_record_class(kind: Any) -> bool:
    """A class that only holds fields, and is no output of a model, which is a dict too."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and not issubclass(kind, dict)


def record_fields(kind: Any) -> dict[str, inspect.Parameter]:
    """The fields of a dataclass that its constructor takes."""
    names = vars(sys.modules[kind.__module__])
    return {
        name: parameter.replace(annotation=_evaluated(parameter.annotation, names))
        for name, parameter in inspect.signature(kind).parameters.items()
    }


def _record(kind: type) -> ValueType:
    fields = record_fields(kind)
    needed = tuple(name for name, each in fields.items() if each.default is each.empty)
    types = tuple(parameter_type(each) for each in fields.values())
    return ValueType("record", types, names=tuple(fields), needed=needed)


def type_of(value: Any) -> ValueType:
    """The narrowest type that holds a default; lists and tuples may have any length."""
    if isinstance(value, Enum):
        return value_type(type(value))
    if type(value) in PLAIN:
        return PLAIN[type(value)]
    if isinstance(value, list | tuple):
        item = _union(type_of(each) for each in value) if value else ANY_VALUE
        return ValueType("list" if isinstance(value, list) else "row", (item,))
    return ValueType("dict", (ANY_VALUE,)) if isinstance(value, dict) else OBJECT


def fits(value: Any, wanted: ValueType) -> bool:
    """Whether a default is of the type that its annotation gives; whole numbers are numbers too."""
    if wanted.kind == "union":
        return any(fits(value, choice) for choice in wanted.of)
    if wanted.kind in ("list", "row", "tuple"):
        is_row = isinstance(value, list if wanted.kind == "list" else tuple)
        items = wanted.of if wanted.kind == "tuple" else wanted.of * (len(value) if is_row else 0)
        return is_row and len(value) == len(items) and all(map(fits, value, items))
    if wanted.kind == "choice":
        return (value.value if isinstance(value, Enum) else value) in wanted.choices
    if wanted.kind == "dict":
        return isinstance(value, dict)
    found = type_of(value)
    return wanted == ANY_VALUE or found == wanted or (found.kind, wanted.kind) == ("int", "float")


@functools.cache
def _types_of_class(pipeline_class: type) -> dict[str, ValueType]:
    return argument_types(pipeline_class, call_inputs(pipeline_class))


def _as_taken(value: Any, wanted: ValueType) -> Any:
    kinds = {choice.kind for choice in (wanted.of if wanted.kind == "union" else (wanted,))}
    is_tuple = isinstance(value, list) and kinds & {"row", "tuple"} and not kinds & {"list", "any"}
    return tuple(value) if is_tuple else value


def _union(choices: Iterable[ValueType]) -> ValueType:
    """One choice is itself, and a union in a union is one of its choices' own."""
    flat = [part for choice in choices for part in (choice.of if choice.kind == "union" else (choice,))]
    unique = tuple(dict.fromkeys(flat))
    return unique[0] if len(unique) == 1 else ValueType("union", unique)


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except Exception:  # noqa: BLE001  (names that only a type checker imports, or that are gone)
        return annotation


def _is_plain(annotation: Any) -> bool:
    return isinstance(annotation, collections.abc.Hashable) and annotation in PLAIN


def _is_path(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, PurePath)


def _is_tensor(kind: type) -> bool:
    return kind.__module__ == "torch" and kind.__name__.endswith("Tensor")  # torch.FloatTensor is no subclass
