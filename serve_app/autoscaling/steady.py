"""What a deployment's share of a full pool is reckoned by: its need of the moment, or its mean need if that alternates.

A replica that is moved loads its weights first. The first times a load shifts, replicas follow at once. A deployment
whose replicas were started again and again gets its share by the mean of its need, and so keeps what it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

MEMORY_IN_LOADS = 10.0  # times of loading over which starts and needs fade: loading takes about a tenth of the time
UNKNOWN_LOAD_S = 60.0  # until a replica has told how long its start took


@dataclass(frozen=True)
class Steadied:
    """Fading means of one deployment, at a moment."""

    time_s: float
    mean: float  # of the replicas that were needed
    starts: float  # replicas that were started, those of long ago faded

    def fair(self, needed: float, have: int) -> float:
        """`needed` while all its replicas were started at most once in the memory, the mean when twice or more."""
        times = self.starts / max(1.0, have, needed)
        at_once = max(0.0, min(1.0, 2.0 - times))
        return at_once * needed + (1.0 - at_once) * self.mean

    def with_starts(self, more: int) -> Steadied:
        return replace(self, starts=self.starts + max(0, more))


def steadied(before: Steadied | None, needed: float, load_s: float, now_s: float) -> Steadied:
    """What is known at `now_s`, when `needed` replicas are needed; None before: nothing is known yet."""
    if before is None:
        return Steadied(now_s, needed, 0.0)
    kept = math.exp(-max(0.0, now_s - before.time_s) / (MEMORY_IN_LOADS * (load_s or UNKNOWN_LOAD_S)))
    return Steadied(now_s, kept * before.mean + (1 - kept) * needed, kept * before.starts)
