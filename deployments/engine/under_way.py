"""What a thread works on, and since when: seen from another thread, it tells work that never ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KINDS_KEPT = 4096
FADING = 0.9  # of the usual seconds of a kind, with each work that took less
ENOUGH = 3  # works of a kind after the first, before their seconds are taken for usual


@dataclass(frozen=True)
class Look:
    """A thread at one moment."""

    seconds: float = 0.0  # since the begin of the work; 0 where there is none
    is_first: bool = False  # of its kind: it may take longer, while kernels are compiled or searched for
    usual_s: float | None = None  # that works of this kind take; None: too few have been seen
    began: float = 0.0  # by the clock


@dataclass
class _Usual:
    seconds: float = 0.0  # of the longest of the latest
    count: int = 0


class UnderWay:
    """Of one thread. A work inside another one counts by itself, and not for the other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now: tuple[Hashable, float] | None = None  # the kind of the work, and when it began
        self._usual: dict[Hashable, _Usual] = {}  # of the kinds that were done
        self._ended: float = clock()

    @contextmanager
    def work(self, kind: Hashable, is_regular: bool = True) -> Iterator[None]:
        """Works of a regular kind take about as long as each other."""
        outer, began = self._now, self._clock()
        self._now = kind, began
        try:
            yield
            self._note(kind, self._clock() - began, is_regular)
        finally:
            self._ended = self._clock()
            self._now = outer and (outer[0], outer[1] + self._ended - began)

    def look(self) -> Look:
        """Its work now."""
        now = self._now
        if now is None:
            return Look()
        kind, began = now
        usual = self._usual.get(kind)
        is_known = usual is not None and usual.count >= ENOUGH
        return Look(self._clock() - began, usual is None, usual.seconds if usual and is_known else None, began)

    @property
    def idle_since(self) -> float | None:
        """When the last work ended, by the clock; None during one."""
        return self._ended if self._now is None else None

    def _note(self, kind: Hashable, seconds: float, is_regular: bool) -> None:
        known = self._usual.get(kind)
        if known is None:  # the first, whose seconds tell nothing of others
            if len(self._usual) >= KINDS_KEPT:
                self._usual.clear()
            self._usual[kind] = _Usual()
        elif is_regular:
            known.seconds = max(seconds, known.seconds * FADING)
            known.count += 1
