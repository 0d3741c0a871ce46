"""A turn of the device: a batch that was given to it, and which fibers it is for, until it is seen to be done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from deployments.engine.fiber import Fiber
from deployments.engine.forward import Forward, Structure
from deployments.engine.marks import Mark

EARLY = 0.1  # of a turn's time before its end the next batch is decided; a device may be faster than was measured
EARLY_S = 0.005  # or so many seconds: until a launched forward keeps the device busy
IN_FLIGHT = 2  # turns: one that the device works on, and the next one


@dataclass(eq=False)
class Turn:
    """Holds no tensors: the forwards' numbers belong to their fibers."""

    component: str
    structure: Structure
    kind: Hashable
    fibers: Sequence[tuple[Fiber, int]]  # with the samples that each has in the batch
    queue_seconds: tuple[float, ...]
    started: float  # by the host's clock
    begun: Mark
    ended: Mark
    is_merged: bool
    teaches_costs: bool
    compiled_s: float  # that its forwards spent on being compiled, while the device waited
    num_failed: int
    num_passes_together: int
    expected_s: float  # 0: unknown
    ends: float  # by the host's clock, as expected
    is_settled: bool = field(default=False)

    @property
    def num_samples(self) -> int:
        return sum(samples for _, samples in self.fibers)

    @property
    def is_due(self) -> float:
        """When the next batch has to be decided, for the device not to wait for it."""
        return self.ends - max(EARLY_S, EARLY * self.expected_s)


def turn_of(
    batch: Sequence[Forward],
    begun: Mark,
    ended: Mark,
    started: float,
    free_at: float,
    expected_s: float | None,
    is_merged: bool,
    teaches_costs: bool,
    compiled_s: float,
) -> Turn:
    """`free_at` is when the device has done the turns before."""
    first, expected_s = batch[0], expected_s or 0.0
    samples = sum(forward.num_samples for forward in batch)
    return Turn(
        first.component,
        first.structure,
        (first.component, first.structure.shape, samples),
        [(forward.fiber, forward.num_samples) for forward in batch],
        tuple(started - forward.arrived for forward in batch),
        started,
        begun,
        ended,
        is_merged,
        teaches_costs,
        compiled_s,
        sum(forward.error is not None for forward in batch),
        passes_together(batch) if is_merged else 0,
        expected_s,
        max(started, free_at) + expected_s,
    )


def passes_together(batch: Sequence[Forward]) -> int:
    """How many of its forwards share it with others of their own fiber."""
    return sum(count for count in Counter(forward.fiber for forward in batch).values() if count > 1)
