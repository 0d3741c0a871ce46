"""A forward of a denoiser that waits for the device, and the request that it is of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from deployments.engine.merging import Merger
from deployments.tensors.values import tensors


@dataclass(eq=False)
class Job:
    """One request as the engine knows it."""

    request_id: str
    deterministic: bool = False
    deadline: float | None = None  # time.monotonic() by which it should be done; None: not known yet
    arrived: float = field(default_factory=time.monotonic)
    remaining_forwards: Callable[[], int] = lambda: 1
    expires: float = math.inf  # time.monotonic() after which nobody wants it
    cancelled: bool = False
    forwards: int = 0
    merged_forwards: int = 0
    seconds: float = 0.0  # its share of the device's time
    step_s: float = 0.0  # seconds of its newest forward alone, as such forwards usually take


@dataclass(eq=False)
class Structure:
    """What forwards have in common that may share a batch; one object for each `key`, quick to compare."""

    key: Hashable  # the denoiser, its cache context, and of each argument what merging asks for
    shape: str  # for people
    is_alone: bool = False  # a forward that never shares

    def __str__(self) -> str:
        return str(self.key)


@dataclass(eq=False)
class Forward:
    """A forward that waits for the device."""

    job: Job
    module: Any
    component: str
    context: tuple[Any, dict[str, Any]] | None
    arguments: dict[str, Any]
    caches: AbstractContextManager[None] | None  # lends the request's cache contexts to the module
    structure: Structure = field(default_factory=lambda: Structure(None, ""))
    num_samples: int = 1
    merger: Merger | None = None
    arrived: float = field(default_factory=time.monotonic)
    request: greenlet = field(default_factory=getcurrent)  # goes on when the forward is done
    output: Any = None
    error: BaseException | None = None


def tokens_per_sample(forward: Forward) -> int:
    """Positions of the noisy latents that one sample brings."""
    largest = largest_argument(forward)
    if largest is None:
        return 1
    return max(1, int(largest.numel()) // forward.num_samples // max(1, int(largest.shape[-1])))


def shape_of_sample(forward: Forward) -> str:
    """The largest argument without its first axis, for people: "1024x64"."""
    largest = largest_argument(forward)
    return "x".join(map(str, largest.shape[1:])) if largest is not None else ""


def largest_argument(forward: Forward) -> torch.Tensor | None:
    candidates: Iterable[Any] = tensors(forward.arguments)
    return max((t for t in candidates if t.is_floating_point() and t.ndim), key=torch.Tensor.numel, default=None)
