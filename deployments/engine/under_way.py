"""What a thread works on, and since when: seen from another thread, it tells work that never ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

KINDS_KEPT = 4096


class UnderWay:
    """Of one thread, which does one work at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now: tuple[float, bool] | None = None  # when it began, and whether it is the first of its kind
        self._done: set[Hashable] = set()  # kinds

    @contextmanager
    def work(self, kind: Hashable) -> Iterator[None]:
        """The first of a kind may take longer: kernels are compiled or searched for."""
        self._now = (self._clock(), kind not in self._done)
        try:
            yield
            if len(self._done) >= KINDS_KEPT:
                self._done.clear()
            self._done.add(kind)
        finally:
            self._now = None

    def seconds(self) -> tuple[float, bool]:
        """Since the begin of the work, 0 where there is none; and whether it is the first of its kind."""
        now = self._now
        return (0.0, False) if now is None else (self._clock() - now[0], now[1])
