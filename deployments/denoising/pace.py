"""How long the steps of a request take lately, for what callers are told of the time that is left."""

from __future__ import annotations

import statistics
from collections import deque

LAST = 5  # steps


class StepPace:
    """The middle of the last steps: a wait for others, or for a compilation, is none of them.

    The first step counts for nothing, as before it a request waits for its turn.
    """

    def __init__(self) -> None:
        self._ended: float | None = None  # time.monotonic() of the latest step
        self._seconds: deque[float] = deque(maxlen=LAST)

    def end_step(self, now: float) -> None:
        if self._ended is not None:
            self._seconds.append(now - self._ended)
        self._ended = now

    def seconds_left(self, num_steps: int) -> float | None:
        """Of so many more steps; None before the second has ended."""
        return statistics.median_low(self._seconds) * num_steps if self._seconds else None
