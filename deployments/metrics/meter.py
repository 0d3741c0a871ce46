"""A meter takes what the rooms measure; this one takes nothing."""

from __future__ import annotations

from typing import Protocol


class Meter(Protocol):
    """Metrics by their names in `deployments.metrics.table`, each with exactly its labels; safe in any thread."""

    def begin(self, area: str, /, **known: tuple[str, ...]) -> None:
        """Counters of the area stand at 0 from now on, so that their first event is an increase.

        Those with an open label begin with the values that are `known` of it, or with their first event.
        """

    def count(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        """Add to a counter; nothing where `value` is 0."""

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """What a gauge stands at now."""

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """One more event of a histogram."""


class _NoMeter:
    def begin(self, area: str, /, **known: tuple[str, ...]) -> None:
        pass

    def count(self, name: str, value: float = 1.0, /, **labels: str) -> None:
        pass

    def set(self, name: str, value: float, /, **labels: str) -> None:
        pass

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        pass


NO_METER: Meter = _NoMeter()
