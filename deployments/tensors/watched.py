"""Notices what a call writes into the objects that it is given: key-value caches, counters beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from deployments.tensors.values import PLAIN, PORTABLE, parts


class Watched:
    """What a call is about to be given; asked after the call."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._tensors = [(tensor, _version(tensor)) for tensor in _tensors(value)]
        self._counters = [(container, _plain_items(container)) for container in _containers(value)]

    def is_written(self) -> bool:
        """Whether a tensor was changed in place, put in or taken out, in whatever containers and objects it lies."""
        now = list(_tensors(self._value))
        return len(now) != len(self._tensors) or any(
            tensor is not before or _version(tensor) != version
            for tensor, (before, version) in zip(now, self._tensors, strict=True)
        )

    def contains(self, containers: list[Any]) -> bool:
        """Whether one of these is among the lists and dictionaries."""
        return any(container is each for container, _ in self._counters for each in containers)

    def counted(self) -> list[Any]:
        """The lists and dictionaries of which plain values were changed."""
        return [container for container, before in self._counters if _plain_items(container) != before]


def _version(tensor: torch.Tensor) -> int:
    """Raised by torch at each change in place, also of a view."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(value: Any, seen: frozenset[int] = frozenset()) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    opened = parts(value)
    if opened is not None:
        children = opened[0]
    elif isinstance(value, (*PORTABLE, torch.nn.Module)) or id(value) in seen:
        return
    else:  # an object of the model's own, such as a cache
        children = list(getattr(value, "__dict__", {}).values())
    for child in children:
        yield from _tensors(child, seen | {id(value)})


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        yield value
    opened = parts(value)
    for child in opened[0] if opened else ():
        yield from _containers(child)


def _plain_items(container: Any) -> list[Any]:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return [(key, value) for key, value in items if isinstance(value, PLAIN)]
