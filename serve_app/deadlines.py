"""How long a caller gives a request: until it has begun, and until it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from deployments.messages import Media
from serve_app.errors import CancelAfterError, StartTimeoutError


@dataclass(frozen=True)
class TimeLimits:
    """Seconds from the acceptance of a request; None: as long as it takes."""

    start_s: float | None = None
    total_s: float | None = None

    @property
    def shortest_s(self) -> float | None:
        return min((each for each in (self.start_s, self.total_s) if each is not None), default=None)


NO_LIMITS = TimeLimits()


class Deadlines:
    """The limits of what one caller has asked for, from now on; its pictures have begun when the first of them has."""

    def __init__(self, limits: TimeLimits) -> None:
        self.limits = limits
        now = asyncio.get_running_loop().time()
        self._start_at = None if limits.start_s is None else now + limits.start_s
        self._end_at = None if limits.total_s is None else now + limits.total_s
        self._waiting: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """From now on there is time until the end."""
        self._start_at = None
        for timeout in self._waiting:
            if not timeout.expired():
                timeout.reschedule(None)

    async def keep(self, make: Callable[[], Awaitable[Media]]) -> Media:
        """What `make` makes. Raises StartTimeoutError, CancelAfterError; then it is not made any further."""
        start, end = asyncio.timeout_at(self._start_at), asyncio.timeout_at(self._end_at)
        try:
            async with end, start:
                self._waiting.add(start)
                try:
                    return await make()
                finally:
                    self._waiting.discard(start)
        except TimeoutError:
            if start.expired():
                raise StartTimeoutError(not_begun(self.limits.start_s)) from None
            if end.expired():
                raise CancelAfterError(not_done(self.limits.total_s)) from None
            raise


def not_begun(seconds: float | None) -> str:
    return f"the request had not begun {_number(seconds)} s after it was accepted (X-Request-Start-Timeout): not made"


def not_done(seconds: float | None) -> str:
    return f"the request was not done {_number(seconds)} s after it was accepted (Cancel-After): it was cancelled"


def _number(seconds: float | None) -> str:
    return f"{seconds or 0:g}"
