"""The time that the engine goes by, which a simulation replaces."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Of the host."""

    def now(self) -> float:
        """Seconds, of no date."""
        ...

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        """Returns when somebody notifies, or after so many seconds; `changed` is held."""
        ...


class HostClock:
    """The machine's."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        changed.wait(seconds)
