"""What the engine and its sessions measure, told as it happens to whoever exports it; no library of metrics here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployments.engine.engine import Engine


@dataclass(frozen=True)
class BatchRun:
    """One turn of the device: the forwards of one or more requests."""

    component: str
    shape: str  # of one sample's largest argument, such as "1024x64"
    num_forwards: int
    num_samples: int
    seconds: float
    queue_seconds: tuple[float, ...]  # of each forward, from its arrival to the start of this turn
    is_merged: bool  # False too where several forwards ran one after another
    num_failed: int = 0


@dataclass(frozen=True)
class CheckpointMade:
    """A checkpoint left the session."""

    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class Resumed:
    """A request goes on from a checkpoint."""

    step: int


@dataclass(frozen=True)
class Cancelled:
    """A request was cancelled."""


@dataclass(frozen=True)
class CachedSteps:
    """Steps of one transformer in one finished request, under Cache-DiT."""

    component: str
    computed: int
    reused: int


@dataclass
class EngineStatistics:
    """What the engine has done; the replica's metrics read it."""

    forwards: int = 0  # of requests
    batches: int = 0  # of the device
    merged: int = 0  # forwards that shared a batch
    refused_structures: int = 0  # structures whose merge deviated and is never made again
    bisections: int = 0
    cancelled: int = 0
    seconds: float = 0.0  # of the device
    batch_sizes: dict[int, int] = field(default_factory=dict)


Measurement = BatchRun | CheckpointMade | Resumed | Cancelled | CachedSteps
Measure = Callable[[Measurement], None]


def ignore(measurement: Measurement) -> None:
    """Nobody exports measurements."""


def engine_measurements(engine: Engine) -> dict[str, Any]:
    """What the engine has done since its start and what waits, as plain values."""
    return {
        **asdict(engine.statistics),
        "waiting": engine.num_waiting,
        "requests": engine.num_jobs,
        "step_seconds": engine.costs.table(),
    }
