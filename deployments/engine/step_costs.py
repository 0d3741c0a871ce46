"""Seconds of a forward by structure and number of samples, measured as they happen."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

SMOOTHING = 0.2  # weight of the newest measurement
SHAPES_KEPT = 4096


@dataclass
class _Cost:
    average: float
    newest: float
    is_first: bool = True  # it may have compiled or searched for kernels: the second takes its place


class StepCosts:
    """Exponential averages; what was not measured is estimated from what was."""

    def __init__(self) -> None:
        self._costs: dict[Hashable, dict[int, _Cost]] = {}

    def record(self, structure: Hashable, num_samples: int, seconds: float) -> None:
        if structure not in self._costs and len(self._costs) >= SHAPES_KEPT:
            self._costs.pop(next(iter(self._costs)), None)  # the oldest
        known = self._costs.setdefault(structure, {})
        before = known.get(num_samples)
        if before is None:
            known[num_samples] = _Cost(seconds, seconds)
        else:
            average = seconds if before.is_first else before.average + SMOOTHING * (seconds - before.average)
            known[num_samples] = _Cost(average, seconds, is_first=False)

    def predict(self, structure: Hashable, num_samples: int) -> float | None:
        """Seconds of one forward; None before the first measurement of the structure.

        Between two numbers of samples on the line through them, and beyond the largest on that through the last two; a
        lone number is taken in proportion upwards.
        """
        known = sorted((n, cost.average) for n, cost in list(self._costs.get(structure, {}).items()))
        if not known:
            return None
        fewer = [each for each in known if each[0] <= num_samples]
        if not fewer:
            return known[0][1]
        at, seconds = fewer[-1]
        if at == num_samples:
            return seconds
        if len(known) == 1:
            return seconds * num_samples / at
        left, right = (fewer[-1], known[len(fewer)]) if len(fewer) < len(known) else (known[-2], known[-1])
        slope = max(0.0, (right[1] - left[1]) / (right[0] - left[0]))
        return seconds + slope * (num_samples - at)

    def at_least(self, structure: Hashable, num_samples: int) -> float | None:
        """The lesser of the average and the newest measurement; None where it was not measured."""
        cost = self._costs.get(structure, {}).get(num_samples)
        return None if cost is None else min(cost.average, cost.newest)

    def table(self) -> dict[str, dict[int, float]]:
        return {
            str(structure): {n: cost.average for n, cost in known.items()} for structure, known in self._costs.items()
        }
