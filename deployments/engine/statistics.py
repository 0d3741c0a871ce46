"""What the engine counts, and what it tells of each turn of the device to whoever exports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BatchRun:
    """One turn of the device: the forwards of one or more fibers."""

    component: str
    shape: str  # of one sample's largest argument, such as "1024x64"
    num_forwards: int
    num_samples: int
    seconds: float
    queue_seconds: tuple[float, ...]  # of each forward, from its arrival to the start of this turn
    is_merged: bool  # False too where several forwards ran one after another
    num_failed: int = 0
    num_passes_together: int = 0  # of the forwards: those that shared a merged batch with others of their own fiber


@dataclass(frozen=True)
class StructureRefused:
    """Merged forwards of a structure deviate from lone ones: they are never merged again."""

    component: str


@dataclass(frozen=True)
class Cancelled:
    """A fiber was cancelled."""


@dataclass
class EngineStatistics:
    """What the engine has done since its start."""

    forwards: int = 0  # of all fibers
    batches: int = 0  # of the device
    merged: int = 0  # forwards that shared a batch
    passes_together: int = 0  # forwards that shared it with others of their own fiber
    refused_structures: int = 0  # structures whose merge deviated and is never made again
    bisections: int = 0
    cancelled: int = 0
    seconds: float = 0.0  # of the device
    batch_sizes: dict[int, int] = field(default_factory=dict)


Measure = Callable[[BatchRun | Cancelled | StructureRefused], None]


def ignore(measurement: object) -> None:
    """Nobody exports measurements."""
