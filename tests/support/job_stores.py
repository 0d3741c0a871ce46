"""Job stores of tests: a clock that the test turns, and a file with the tables in it, made once."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from serve_app.jobs.database import open_database
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


def put_tables(folder: Path) -> Path:
    """An empty job store in SQLite, unless the folder has one: to copy the tables is faster than to make them."""
    file = folder / "jobs.sqlite"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_empty_store())
    return folder


@functools.cache
def _empty_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        open_database(None, Path(folder)).dispose()
        return (Path(folder) / "jobs.sqlite").read_bytes()
