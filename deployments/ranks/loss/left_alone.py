"""Notices ranks that wait for one that lacked memory for a forward, long before their wait itself ends.

What else a forward fails by, it fails by on all ranks, however far they are apart; else the wait itself ends the group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

LONGEST_REASON = 2000  # characters
PATIENCE_S = 5.0  # ranks that compute the same samples fail at the same place, if they all do
ANY_FORWARD = -1  # of a rank that did not even learn what it was asked


@dataclass(frozen=True)
class Failure:
    """Of one rank, at the forward of this number."""

    forward: int
    reason: str
    lacks_memory: bool


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_REASON]


def told_failure(store: Any, rank: int) -> Failure | None:
    """The newest of a rank; `store`: a connection of the caller's thread."""
    key = _key(rank)
    return Failure(**json.loads(store.get(key))) if store.check([key]) else None


def tell_failure(store: Any, rank: int, failure: Failure) -> None:
    """Before the rank answers: rank 0 may be in a wait for it meanwhile, and hear no answer."""
    store.set(_key(rank), json.dumps(asdict(failure)))


class LeftAlone:
    """Looks at the forward that is under way; for one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: tuple[int, float] | None = None  # the forward, and when its first failure was seen

    def look(self, forward: int, failures: Mapping[int, Failure], ranks_of_sample: int) -> list[int]:
        """The ranks that lacked memory for it, where others of their samples have not failed and will not any more."""
        failed = {r for r, each in failures.items() if each.forward in (forward, ANY_FORWARD)}
        lacking = [rank for rank in sorted(failed) if failures[rank].lacks_memory]
        alone = [rank for rank in lacking if not _beside(rank, ranks_of_sample) <= failed]
        if not alone:
            self._seen = None
            return []
        if self._seen is None or self._seen[0] != forward:
            self._seen = forward, self._clock()
        return alone if self._clock() - self._seen[1] >= PATIENCE_S else []


def _beside(rank: int, ranks_of_sample: int) -> set[int]:
    """Those that compute the same samples."""
    first = rank - rank % ranks_of_sample
    return set(range(first, first + ranks_of_sample))


def _key(rank: int) -> str:
    return f"failed_forward/{rank}"
