"""A forward that waits for the device, its arguments by name, and what it may share a batch with."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from deployments.engine.batching.merging import Merger
from deployments.engine.executor import CacheContext
from deployments.engine.fiber import Fiber

Surround = Callable[[], AbstractContextManager[None]]  # what is entered around a forward, made anew each time


@dataclass(eq=False)
class Structure:
    """What forwards have in common that may share a batch; one object for each `key`, quick to compare."""

    key: Hashable  # the module, its cache context, the merge key, and of each argument what merging asks for
    shape: str  # for people
    is_alone: bool = False  # a forward that never shares

    def __str__(self) -> str:
        return str(self.key)


@dataclass(eq=False)
class Forward:
    """A forward that waits for the device."""

    fiber: Fiber
    module: Any
    component: str
    context: CacheContext | None
    arguments: dict[str, Any]
    surround: Surround | None = None
    merge_key: Hashable | None = ()  # None: it runs alone; so does a surrounded forward without a key of its own
    by_position: bool = False  # what surrounds it tells the samples of a batch by their place in it
    with_gradients: bool = False  # the pipeline differentiates through it
    structure: Structure = field(default_factory=lambda: Structure(None, ""))
    num_samples: int = 1
    merger: Merger | None = None
    arrived: float = field(default_factory=time.monotonic)
    caller: greenlet = field(default_factory=getcurrent)  # goes on when the forward is done
    output: Any = None
    error: BaseException | None = None

    @property
    def is_alone(self) -> bool:
        """It shares a batch with no other, whatever its arguments."""
        is_surrounded = self.surround is not None and self.merge_key == ()
        return self.merge_key is None or is_surrounded or self.with_gradients or not self.fiber.may_share()


def bind(module: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a forward by name."""
    if not args:
        return dict(kwargs)
    bound = dict(_signature(type(module).forward).bind(module, *args, **kwargs).arguments)
    bound.pop("self", None)
    return {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
