"""Seconds of a forward by denoiser, shape and number of samples, measured as they happen."""

from __future__ import annotations

from collections.abc import Hashable

SMOOTHING = 0.2  # weight of the newest measurement
SHAPES_KEPT = 4096


class StepCosts:
    """Exponential averages; what was not measured is estimated from the nearest number of samples."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, dict[int, float]] = {}

    def record(self, shape: Hashable, num_samples: int, seconds: float) -> None:
        if shape not in self._seconds and len(self._seconds) >= SHAPES_KEPT:
            self._seconds.pop(next(iter(self._seconds)))  # the oldest
        known = self._seconds.setdefault(shape, {})
        before = known.get(num_samples)
        known[num_samples] = seconds if before is None else before + SMOOTHING * (seconds - before)

    def predict(self, shape: Hashable, num_samples: int) -> float | None:
        """Seconds of one forward; None before the first measurement of the shape."""
        known = self._seconds.get(shape)
        if not known:
            return None
        if num_samples in known:
            return known[num_samples]
        nearest = min(known, key=lambda n: abs(n - num_samples))
        return known[nearest] * max(num_samples, nearest) / nearest if num_samples > nearest else known[nearest]

    def table(self) -> dict[str, dict[int, float]]:
        return {str(shape): dict(known) for shape, known in self._seconds.items()}
