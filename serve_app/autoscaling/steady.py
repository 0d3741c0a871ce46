"""What a deployment's share of a full pool is reckoned by: the mean of its need, over as long as moving replicas takes.

A replica that is moved loads its weights first, which must be worth it. Needs of a moment are mostly chance, so they
count in a mean over two times of a load; and a deployment that has just got a replica loses none before that has served
as long as it took to start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MEMORY_IN_LOADS = 2.0  # the time over which a need fades, in times of a load
FIRM_IN_LOADS = 2.0  # how long none is taken away after a start, the load itself included
UNKNOWN_LOAD_S = 60.0  # until a replica has told how long its start took


@dataclass(frozen=True)
class Steadied:
    """Of one deployment, at a moment."""

    time_s: float
    load_s: float
    needed: float  # the fading mean of the replicas that it needed
    started_s: float  # when it last got one

    @property
    def is_firm(self) -> bool:
        """Whether it keeps all that it has, whatever others need."""
        return self.time_s - self.started_s < FIRM_IN_LOADS * self.load_s

    def with_starts(self, more: int) -> Steadied:
        return replace(self, started_s=self.time_s) if more > 0 else self


def steadied(before: Steadied | None, needed: float, load_s: float, now_s: float) -> Steadied:
    """What is known at `now_s`, when `needed` replicas are needed; None before: nothing is known yet."""
    known_load_s = load_s or UNKNOWN_LOAD_S
    if before is None:
        return Steadied(now_s, known_load_s, needed, -math.inf)
    kept = math.exp(-max(0.0, now_s - before.time_s) / (MEMORY_IN_LOADS * known_load_s))
    return Steadied(now_s, known_load_s, kept * before.needed + (1 - kept) * needed, before.started_s)
