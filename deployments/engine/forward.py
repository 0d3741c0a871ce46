"""A forward that waits for the device, its arguments by name, and what it may share a batch with."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from deployments.engine.batching.merging import Merger
from deployments.engine.executor import CacheContext
from deployments.engine.fiber import Fiber
from deployments.tensors.values import PLAIN

Surround = Callable[[], AbstractContextManager[None]]  # what is entered around a forward, made anew each time
# What is entered around a batch: for the samples in the order of their rows each value, and how many samples have it
# (None: samples of a forward with nothing of the kind); whether each sample has as many rows in every argument.
SurroundBatch = Callable[[Sequence[tuple[Any, int]], bool], AbstractContextManager[None]]


@dataclass(frozen=True)
class PerSample:
    """A surrounding that tells the samples of a batch apart: forwards share a batch whatever values they have.

    `enter` is the same for all forwards of a module, and may raise CannotMergeError in a batch of different values.
    """

    enter: SurroundBatch
    value: Hashable  # forwards of equal values are surrounded alike
    kind: Hashable  # of values: a batch of different ones is trusted when a first one of each kind was seen to be right


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
    per_sample: PerSample | None = None
    structure: Structure = field(default_factory=lambda: Structure(None, ""))
    num_samples: int = 1
    merger: Merger | None = None
    arrived: float = field(default_factory=time.monotonic)
    caller: greenlet = field(default_factory=getcurrent)  # goes on when the forward is done
    output: Any = None
    error: BaseException | None = None
    is_done: bool = False  # it has its output or its error
    is_awaited: bool = False  # its caller goes on when it is done; else the caller goes on meanwhile

    @property
    def value(self) -> Hashable:
        """Of what surrounds its samples; None where nothing does."""
        return None if self.per_sample is None else self.per_sample.value

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


def without_defaults(module: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward but for those that are given as what they are when they are not given."""
    parameters = _signature(type(module).forward).parameters

    def is_default(name: str, value: Any) -> bool:
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        return isinstance(value, PLAIN) and type(value) is type(default) and value == default

    return {name: value for name, value in arguments.items() if not is_default(name, value)}


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
