"""Which of the waiting forwards goes first: the least by one of these orders."""

from __future__ import annotations

import math
from collections.abc import Callable

from deployments.engine.fiber import Fiber

Order = Callable[[Fiber, float], float]


def first_come(fiber: Fiber, now: float) -> float:
    """First come, first served."""
    return fiber.arrived


def smallest_slack(fiber: Fiber, now: float) -> float:
    """Seconds to the deadline beyond what the fiber still needs; a waiting fiber's slack only shrinks.

    A fiber without a deadline goes first: its deadline is set when its first forward has been measured. One that is
    late counts by how much in its own durations: else a long one, late by seconds on a machine that has become slow,
    would hold up every short one for as many seconds.
    """
    if fiber.deadline is None:
        return -math.inf
    remaining = fiber.remaining_forwards()
    slack = fiber.deadline - now - fiber.step_s * remaining
    return slack if slack >= 0 else slack / max(fiber.step_s * (fiber.forwards + remaining), 1e-9)


ORDERS: dict[str, Order] = {"slack": smallest_slack, "fifo": first_come}
