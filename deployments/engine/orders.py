"""Which of the waiting forwards goes first: the least by one of these orders, among equals the fiber made first."""

from __future__ import annotations

import math
from collections.abc import Callable

from deployments.engine.fiber import Fiber

Order = Callable[[Fiber, float], float]

DEFAULT_ALLOWANCE = 3.0  # times its own duration that a fiber has whose caller set no deadline


def first_come(fiber: Fiber, now: float) -> float:
    """First come, first served."""
    return fiber.arrived


def earliest_deadline(fiber: Fiber, now: float) -> float:
    """Seconds to the deadline; among fibers of one duration the first come is also the first done.

    A deadline that grows with the fiber's own duration lets short ones pass long ones, and as time goes on that of a
    long one comes before theirs: nobody starves. A fiber that waits is not preferred to the one that has the device
    because its slack shrinks meanwhile: equal ones by turns would all be done last.

    A fiber without a deadline goes first until its duration is known: a forward tells it. One that has less time left
    than it takes from begin to end counts by how much in its own durations: else a long one, late by seconds on a
    machine that has become slow, would hold up every short one for as many seconds.
    """
    duration = fiber.step_s * (fiber.forwards + fiber.remaining_forwards())
    if fiber.deadline is None:
        left = fiber.arrived + DEFAULT_ALLOWANCE * duration - now if duration > 0 else -math.inf
    else:
        left = fiber.deadline - now
    return left if left >= duration or duration <= 0 else left / duration - 1


ORDERS: dict[str, Order] = {"slack": earliest_deadline, "fifo": first_come}
