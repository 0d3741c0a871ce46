"""How long the steps of a request take lately, for what callers are told of the time that is left."""

from __future__ import annotations

import statistics
from collections import deque

LAST = 12  # steps: some are quick, where a cache computes one of three or two schedulers step by turns


class StepPace:
    """The mean of the last steps but the longest: that was a wait for others, or for a compilation.

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
        if not self._seconds:
            return None
        usual = sorted(self._seconds)[:-1] or self._seconds
        return statistics.fmean(usual) * num_steps
