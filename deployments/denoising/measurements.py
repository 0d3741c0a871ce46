"""What a denoiser measures beside its engine, told as it happens; no library of metrics here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Measure = Callable[[object], None]  # takes the measurements of the engine, of this room and of the features


@dataclass(frozen=True)
class CheckpointMade:
    """A checkpoint left the session."""

    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Resumed:
    """A request goes on from a checkpoint."""

    step: int
