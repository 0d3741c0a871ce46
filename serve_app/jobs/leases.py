"""When a lease has ended, as one process observes it: no clock of another machine, and no date, has a part in it.

A runner changes the heartbeat of its jobs again and again. A lease whose heartbeat was seen to stand still for as
long as it was taken for has ended. Time counts by this process's monotonic clock, and only while it looked: after a
pause in which it could not see the store, it does not know whether the heartbeat stood still.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

LOOK_S = 5.0  # a longer pause between two looks proves nothing


@dataclass(frozen=True)
class Lease:
    """As it stands in the store; `seconds`: how long it lasts after its last heartbeat."""

    job_id: str
    owner: str | None  # None: nobody works on the job, it is put off
    heartbeat: int
    seconds: float


@dataclass(frozen=True)
class Sighting:
    lease: Lease
    unchanged_s: float
    seen_at: float  # monotonic


class SeenLeases:
    """What this process has seen of the leases of an application; from any thread."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._sightings: dict[str, Sighting] = {}
        self._lock = threading.Lock()

    def written(self, lease: Lease) -> None:
        """This process has just written it."""
        with self._lock:
            self._sightings[lease.job_id] = Sighting(lease, 0.0, self._monotonic())

    def look(self, leases: Iterable[Lease]) -> list[Lease]:
        """Those that have ended; `leases` are all that there are."""
        now = self._monotonic()
        with self._lock:
            self._sightings = {lease.job_id: self._sighting(lease, now) for lease in leases}
            return [each.lease for each in self._sightings.values() if each.unchanged_s > each.lease.seconds]

    def _sighting(self, lease: Lease, now: float) -> Sighting:
        before = self._sightings.get(lease.job_id)
        if before is None or before.lease != lease:
            return Sighting(lease, 0.0, now)
        pause_s = now - before.seen_at
        return Sighting(lease, before.unchanged_s + (pause_s if pause_s <= LOOK_S else 0.0), now)
