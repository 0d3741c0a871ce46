"""A clock that the test turns, and the type of the fixture that opens job stores with it."""

from __future__ import annotations

from collections.abc import Callable

from serve_app.jobs.store import JobStore

MakeStore = Callable[..., JobStore]


class Clock:
    """Seconds that pass when the test says so; for time that people set, and for time that nobody sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def watch(store: JobStore, clock: Clock, seconds: int) -> None:
    """So many seconds pass, in which this process looks at the leases as its runner does."""
    for _ in range(seconds):
        clock.now += 1
        store.look_at_leases()
