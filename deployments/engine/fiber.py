"""A fiber: one sequence of forwards, which the engine runs by turns with others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field


class CancelledStage(BaseException):
    """Ends a fiber's work because nobody wants the result any more (pipelines may catch Exception)."""


@dataclass(eq=False)
class Fiber:
    """A claim on the device and what it has had of it so far; here one request's denoising."""

    name: str  # for people
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
