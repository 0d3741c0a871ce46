"""The state of what a pipeline put into the denoiser: told apart from settings, kept in checkpoints, put back."""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin

from deployments.errors import CannotResumeError
from deployments.stage_pipeline.sessions.component import RoutedComponent, unrouted
from deployments.stage_pipeline.sessions.own_modules import ABSENT, Change, OwnModules
from deployments.stage_pipeline.sessions.switches import casts_of
from deployments.tensors.values import PORTABLE, leaves, map_values

UNKEPT = "unkept"  # in place of a state that no message can carry

SETTINGS = (bool, int, float, str)
FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, partial, type)
OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))

# What may hold a state: an object with attributes, the variable of a function, an attribute that was put in.
Holder = Any


class UnkeptError(Exception):
    """There is a state that no message can carry."""


def settings_of(changes: Sequence[Change]) -> Hashable | None:
    """Equal for changes that are alike; None where something in them may keep a state."""
    each = [_settings(change.value) for change in changes]
    if any(settings is None for settings in each):
        return None
    return tuple((id(c.module), c.table, c.name, settings) for c, settings in zip(changes, each, strict=True))


def kept_state(own: OwnModules) -> Any:
    """What `put_back` reads in another process; None: there can be none; UNKEPT: it cannot be kept."""
    changes = own.changes()
    if not changes or settings_of(changes) is not None:
        return None
    try:
        return [_state(holder) for holder in _holders(own, changes)]
    except UnkeptError:
        return UNKEPT


def put_back(own: OwnModules | None, states: Sequence[dict[str, Any]]) -> None:
    """Raises CannotResumeError where the pipeline has put in other things than when the state was kept."""
    try:
        holders = _holders(own, own.changes()) if own is not None else []
    except UnkeptError:
        holders = []
    if own is None or len(holders) != len(states):
        raise CannotResumeError("the pipeline has put other things into the denoiser than before")
    for holder, state in zip(holders, states, strict=True):
        _set_state(holder, map_values(_copied, state), own)


def _settings(value: Any) -> Hashable | None:
    if value is ABSENT or isinstance(value, SETTINGS):
        return type(value), value
    if (casts := casts_of(value)) is not None:
        return casts, value.stride()
    cls: Any = type(value)
    if isinstance(value, (torch.nn.Module, *FUNCTIONS, *PORTABLE)) or _has_more_than_attributes(cls):
        return None
    attributes = getattr(value, "__dict__", None)
    if attributes is None or not all(isinstance(attribute, SETTINGS) for attribute in attributes.values()):
        return None
    return cls, tuple((name, type(x), x) for name, x in sorted(attributes.items()))


@functools.cache
def _has_more_than_attributes(cls: type) -> bool:
    """Objects of the class may keep a state elsewhere than in their attributes."""
    shared = [value for base in cls.__mro__[:-1] for value in vars(base).values()]
    return hasattr(cls, "__slots__") or any(isinstance(value, list | dict | set | torch.Tensor) for value in shared)


def _holders(own: OwnModules, changes: Sequence[Change]) -> list[Holder]:
    """All that can hold a state, once each, in an order that is the same in every process."""
    found: dict[int, Holder] = {}
    for change in changes:
        if casts_of(change.value) is not None:
            continue  # the pipeline casts again
        if change.value is not ABSENT and _is_data(change.value):
            found[id(change)] = change
        else:
            _collect(change.value, own, found)
    return list(found.values())


def _collect(value: Any, own: OwnModules, found: dict[int, Holder]) -> None:
    if value is ABSENT or id(value) in found or _is_data(value):
        return
    if isinstance(value, FUNCTIONS):
        _collect_of_function(value, own, found)
    elif isinstance(value, tuple | list | dict):
        items = list(value.values() if isinstance(value, dict) else value)
        if not isinstance(value, tuple) and any(map(_is_data, items)):
            raise UnkeptError
        for item in items:
            _collect(item, own, found)
    elif issubclass(type(value), RoutedComponent) and own.has(unrouted(value)):
        return
    elif issubclass(type(value), RoutedComponent) or not hasattr(value, "__dict__"):
        raise UnkeptError
    elif isinstance(value, torch.nn.Module) and own.has(value):
        return  # a part of the component itself: its changes are known
    elif isinstance(value, ConfigMixin) and not isinstance(value, torch.nn.Module):
        raise UnkeptError  # the pipeline or its scheduler, which a resume runs again
    else:
        found[id(value)] = value
        for attribute in _attributes(value).values():
            _collect(attribute, own, found)
        for child in value.children() if isinstance(value, torch.nn.Module) else ():
            _collect(child, own, found)


def _collect_of_function(value: Any, own: OwnModules, found: dict[int, Holder]) -> None:
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            if id(cell) not in found:
                found[id(cell)] = cell
                _collect(_contents(cell), own, found)
    elif isinstance(value, types.MethodType):
        _collect(value.__self__, own, found)
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            _collect(part, own, found)


def _state(holder: Holder) -> dict[str, Any]:
    return {name: value for name, value in _attributes(holder).items() if _is_data(value)}


def _set_state(holder: Holder, state: dict[str, Any], own: OwnModules) -> None:
    if isinstance(holder, Change):
        own.take(replace(holder, value=state["contents"]))
    elif isinstance(holder, types.CellType):
        if state:
            holder.cell_contents = state["contents"]
    else:
        for name, value in state.items():
            is_buffer = isinstance(holder, torch.nn.Module) and name in holder._buffers
            attributes: dict[str, Any] = holder._buffers if is_buffer else holder.__dict__
            attributes[name] = value


def _attributes(holder: Holder) -> dict[str, Any]:
    if isinstance(holder, Change):
        return {"contents": holder.value}
    if isinstance(holder, types.CellType):
        return {"contents": _contents(holder)}
    if isinstance(holder, torch.nn.Module):
        own = {name: value for name, value in vars(holder).items() if name not in OF_EVERY_MODULE}
        return own | dict(holder.named_buffers(recurse=False))
    return dict(vars(holder))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return ABSENT


def _is_data(value: Any) -> bool:
    return all(isinstance(leaf, PORTABLE) for leaf in leaves(value))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
