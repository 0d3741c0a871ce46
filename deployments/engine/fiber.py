"""A fiber: one sequence of forwards, which the engine runs by turns with others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

_numbers = count()


class CancelledStage(BaseException):
    """Ends a fiber's work because nobody wants the result any more (pipelines may catch Exception)."""


@dataclass(eq=False)
class Fiber:
    """A claim on the device and what it has had of it so far; here one request's denoising."""

    name: str  # for people
    deterministic: bool = False
    deadline: float | None = None  # time.monotonic() by which its caller wants it done
    arrived: float = field(default_factory=time.monotonic)
    remaining_forwards: Callable[[], int] = lambda: 1
    may_share: Callable[[], bool] = lambda: True  # a batch with others, now
    expires: float = math.inf  # time.monotonic() after which nobody wants it
    cancelled: bool = False
    failed: BaseException | None = None  # what the device raised of a forward after the fiber had gone on
    forwards: int = 0  # that were given to the device
    merged_forwards: int = 0
    passes_together: int = 0  # of them, those that shared a batch with others of this fiber
    batched_forwards: int = 0  # of all its batches, those of others too
    largest_batch: int = 0  # forwards
    mates: set[int] = field(default_factory=set)  # numbers of those that shared a batch with it
    timed_forwards: int = 0  # that the device has done
    seconds: float = 0.0  # its share of the device's time
    step_s: float = 0.0  # seconds of its newest forward alone, as such forwards usually take; 0: not known yet
    number: int = field(default_factory=_numbers.__next__)  # the order in which fibers were made
