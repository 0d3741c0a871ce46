"""The modules of a denoiser as one request has them: objects of its own over the weights that all requests share.

Pipelines exchange attention processors, hang hooks into blocks or set switches on them for the length of one call. They
do it to the request's own objects, which nobody else sees, and what they changed is put into the shared modules around
the request's own forwards (`rewired`), in the one thread that makes forwards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

ABSENT: Any = object()
# The attributes of a module that are tables: parameters, children, hooks.
TABLES = frozenset(name for name, value in vars(torch.nn.Module()).items() if isinstance(value, dict))

Attributes = dict[str, Any]
EMPTY: Attributes = {}

_lock = threading.Lock()
_rewired_now: dict[torch.nn.Module, Attributes] = {}  # as everybody else has them


@dataclass(frozen=True)
class Change:
    """What a request's pipeline changed of one module: an attribute, or an entry of one of its tables."""

    module: torch.nn.Module  # the shared one
    table: str | None
    name: Any
    value: Any  # ABSENT: it was taken away


class OwnModules:
    """One request's own objects for the modules of one component, made when its pipeline first asks for them."""

    def __init__(self) -> None:
        self._own: dict[torch.nn.Module, torch.nn.Module] = {}  # shared -> own
        self._own_ids: set[int] = set()
        self._before: dict[torch.nn.Module, Attributes] = {}  # shared -> the attributes of its own one when it was made

    def of(self, shared: torch.nn.Module) -> torch.nn.Module:
        """The request's own object for a module of the component, with own ones for all that is in it."""
        with _lock:
            return self._copied(shared)

    def reading(self, shared: torch.nn.Module, name: str) -> Any:
        """The module to read an attribute from: the request's own one where it has changed it."""
        own = self._own.get(shared)
        if own is None or vars(own).get(name, ABSENT) is self._before[shared].get(name, ABSENT):
            return shared
        return own

    def changes(self) -> list[Change]:
        """What the pipeline has changed by now, in the order of the modules."""
        found: list[Change] = []
        for shared, own in self._own.items():
            if not _is_equal(vars(own), self._before[shared]):
                found += _changes(shared, vars(own), self._before[shared])
        return found

    def take(self, change: Change) -> None:
        """A forward has left this in a shared module where it found the request's changes: it becomes the own one's."""
        _set(self._own[change.module], change.table, change.name, change.value)

    def is_own(self, module: Any) -> bool:
        return id(module) in self._own_ids

    def has(self, module: torch.nn.Module) -> bool:
        """Whether it is a module of the component, shared or own."""
        return module in self._own or self.is_own(module)

    def _copied(self, shared: torch.nn.Module) -> torch.nn.Module:
        if shared in self._own:
            return self._own[shared]
        own = self._own[shared] = object.__new__(type(shared))
        self._own_ids.add(id(own))
        attributes = _copy_of(_rewired_now.get(shared) or vars(shared))
        children = attributes["_modules"]
        children.update({name: self._copied(child) for name, child in children.items() if child is not None})
        vars(own).update(attributes)
        self._before[shared] = _copy_of(attributes, EMPTY)
        return own


@contextmanager
def rewired(own: OwnModules, changes: Sequence[Change]) -> Iterator[None]:
    """The shared modules with the changes in them; only in the thread that makes forwards, one at a time.

    What the forward leaves in these modules, such as a hook's notes, is the request's too.
    """
    put_in = {(change.module, change.table, change.name): change.value for change in changes}
    with _lock:
        _rewired_now.update({change.module: _copy_of(vars(change.module)) for change in changes})
        for change in changes:
            _set(change.module, change.table, change.name, change.value)
    try:
        yield
    finally:
        with _lock:
            for module in dict.fromkeys(change.module for change in changes):
                before = _rewired_now[module]
                for left in list(_changes(module, vars(module), before)):
                    if left.value is not put_in.get((module, left.table, left.name)):
                        own.take(left)
                    _set(module, left.table, left.name, _get(before, left.table, left.name))
                del _rewired_now[module]


def is_rewired(component: torch.nn.Module) -> bool:
    """Whether the shared modules of a component are now as one request has them."""
    return bool(_rewired_now) and any(module in _rewired_now for module in component.modules())


def _copy_of(attributes: Attributes, empty: Attributes | None = None) -> Attributes:
    """With tables of its own; `empty` stands for all empty ones, where nobody writes into them."""
    copied = attributes.copy()
    for name in TABLES:
        copied[name] = copied[name].copy() if copied[name] or empty is None else empty
    return copied


def _is_equal(now: Attributes, before: Attributes) -> bool:
    """Quickly for what is untouched, since it is asked before each forward."""
    try:
        return now == before
    except (RuntimeError, ValueError, TypeError):  # tensors and arrays say of each element whether it is equal
        return False


def _changes(shared: torch.nn.Module, now: Attributes, before: Attributes) -> Iterator[Change]:
    for name in [*now, *(name for name in before if name not in now)]:
        if name in TABLES:
            entries, former = now[name], before[name]
            if not entries and not former:
                continue
            for key in dict.fromkeys([*former, *entries]):
                if entries.get(key, ABSENT) is not former.get(key, ABSENT):
                    yield Change(shared, name, key, entries.get(key, ABSENT))
        elif now.get(name, ABSENT) is not before.get(name, ABSENT):
            yield Change(shared, None, name, now.get(name, ABSENT))


def _get(attributes: Attributes, table: str | None, name: Any) -> Any:
    return (attributes if table is None else attributes[table]).get(name, ABSENT)


def _set(module: torch.nn.Module, table: str | None, name: Any, value: Any) -> None:
    entries = vars(module) if table is None else vars(module)[table]
    if value is ABSENT:
        entries.pop(name, None)
    else:
        entries[name] = value
