"""What a plan of cache-dit writes into the classes of diffusers, kept to the one module that it is for.

Others of the same class, and this one where a rank computes alone, go on with diffusers' own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ABSENT = object()
Written = Mapping[type, dict[str, Any]]  # by class: what was written into it


@dataclass(frozen=True)
class OwnCode:
    """Objects of a module, each with the class that it was made of and the one that has the plan's code."""

    objects: tuple[tuple[Any, type, type], ...]

    def end(self) -> None:
        """They are of the classes that they were made of."""
        for each, made_of, _ in self.objects:
            each.__class__ = made_of

    @contextmanager
    def without(self) -> Iterator[None]:
        """Meanwhile it is so."""
        try:
            self.end()
            yield
        finally:
            for each, _, own in self.objects:
                each.__class__ = own


def with_own_code(module: torch.nn.Module, write: Callable[[], T]) -> tuple[T, OwnCode]:
    """Calls `write`, which writes into classes of diffusers and `forward` into modules; raises what it raises."""
    classes = classes_of_diffusers()
    before = {cls: dict(vars(cls)) for cls in classes}
    forwards = {each: vars(each).get("forward", ABSENT) for each in module.modules()}
    try:
        result = write()
    finally:
        written = taken_back(before)
        of_objects = {each: forward_taken_back(each, old) for each, old in forwards.items()}
    own: list[tuple[Any, type, type]] = []
    made: dict[type, type] = {}
    for each in {id(each): each for each in objects_of(module)}.values():
        cls, forward = type(each), of_objects.get(each) if isinstance(each, torch.nn.Module) else None
        if forward is not None:
            own.append((each, cls, subclass(cls, {**inherited(cls, written), "forward": calling(forward)})))
        elif code := inherited(cls, written):
            own.append((each, cls, made.setdefault(cls, subclass(cls, code))))
    for each, _, new in own:
        each.__class__ = new
    return result, OwnCode(tuple(own))


def classes_of_diffusers() -> list[type]:
    """All that are loaded and that models are made of."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("diffusers.models.")]
    found = {
        value: None
        for module in modules
        for value in list(vars(module).values())
        if isinstance(value, type) and value.__module__.startswith("diffusers.models.")
    }
    return list(found)


def taken_back(before: Mapping[type, dict[str, Any]]) -> Written:
    """What was written since, by class; the classes are as they were."""
    written: dict[type, dict[str, Any]] = {}
    for cls, old in before.items():
        changed = {name: value for name, value in vars(cls).items() if old.get(name, ABSENT) is not value}
        for name in changed:
            if name in old:
                setattr(cls, name, old[name])
            else:
                delattr(cls, name)
        if changed:
            written[cls] = changed
    return written


def forward_taken_back(module: torch.nn.Module, old: Any) -> Any:
    """A `forward` that was written into the module itself; None: it is as it was."""
    new = vars(module).get("forward", ABSENT)
    if new is old or new is ABSENT:
        return None
    if old is ABSENT:
        del module.forward
    else:
        module.forward = old
    return new


def inherited(cls: type, written: Written) -> dict[str, Any]:
    """What an object of the class would have found of it: what a class nearer to it defines goes first."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        found = {name: value for name, value in found.items() if name not in vars(base)}
        found |= written.get(base, {})
    return found


def subclass(cls: type, code: dict[str, Any]) -> type:
    """By the same name: configurations and messages tell of it."""
    about = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**about, **code})


def calling(bound: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return bound(*args, **kwargs)

    return forward


def objects_of(module: torch.nn.Module) -> Iterator[Any]:
    """Its modules, and their attention processors."""
    for each in module.modules():
        yield each
        processor = getattr(each, "processor", None)
        if processor is not None and not isinstance(processor, torch.nn.Module):
            yield processor
