"""The modules of a component as one request has them: objects of its own over the weights that all requests share.

Pipelines exchange attention processors, hang hooks into blocks, cast weights or set switches for the length of one
call. They do it to the request's own objects, which nobody else sees, and what they changed is put into the shared
modules around the request's own calls (`rewired`): a denoiser's in the one thread that makes forwards, those of other
components where one request's code runs at a time.
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
    """One request's own objects for the modules of one component, made when its pipeline first asks for them.

    `root`: the component. `in_parts`: of a part alone, where only that is asked for.
    """

    def __init__(self, root: torch.nn.Module, in_parts: bool = False) -> None:
        self.root = root
        self.in_parts = in_parts
        self.has_casts = False  # whether tensors of its own stand for shared ones
        self._own: dict[torch.nn.Module, torch.nn.Module] = {}  # shared -> own
        self._shared: dict[int, torch.nn.Module] = {}  # id of an own one -> shared
        self._before: dict[torch.nn.Module, Attributes] = {}  # shared -> the attributes of its own one when it was made

    def of(self, module: torch.nn.Module) -> torch.nn.Module:
        """The request's own object for a module of the component, with own ones for all that is in it."""
        if self.is_own(module):
            return module
        with _lock:
            if not self.in_parts:
                self._copied(self.root)
            return self._copied(module)

    def reading(self, shared: torch.nn.Module, name: str) -> Any:
        """The module to read an attribute from: the request's own one where it has changed it."""
        own = self._own.get(shared)
        if own is None or self.has_casts:
            return own or shared
        return shared if vars(own).get(name, ABSENT) is self._before[shared].get(name, ABSENT) else own

    def seen(self, module: torch.nn.Module) -> torch.nn.Module:
        """The request's own object where there is one, else the module itself."""
        return self._own.get(module, module)

    def shared(self, module: torch.nn.Module) -> torch.nn.Module:
        """The shared module for which an own one stands; any other is returned as it is."""
        return self._shared.get(id(module), module)

    def tensors_of(self, own: torch.nn.Module) -> Iterator[tuple[Attributes, Attributes]]:
        """Of all modules in an own one the tables of parameters and of buffers, each with that of the shared module."""
        for module in own.modules():
            if self.is_own(module):
                before = self._before[self.shared(module)]
                for table in ("_parameters", "_buffers"):
                    yield vars(module)[table], before[table]

    def changes(self) -> list[Change]:
        """What the pipeline has changed by now, in the order of the modules."""
        found: list[Change] = []
        for shared, own in self._own.items():
            # Tensors are not asked whether they are equal: those that were cast may be large.
            if self.has_casts or not _is_equal(vars(own), self._before[shared]):
                found += _changes(shared, vars(own), self._before[shared])
        return found

    def take(self, change: Change) -> None:
        """A forward has left this in a shared module where it found the request's changes: it becomes the own one's."""
        _set(self._own[change.module], change.table, change.name, change.value)

    def is_own(self, module: Any) -> bool:
        return id(module) in self._shared

    def has(self, module: torch.nn.Module) -> bool:
        """Whether it is a module of the component, shared or own."""
        return module in self._own or self.is_own(module)

    def _copied(self, shared: torch.nn.Module) -> torch.nn.Module:
        if shared in self._own:
            return self._own[shared]
        own = self._own[shared] = object.__new__(type(shared))
        self._shared[id(own)] = shared
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
