"""Whether the ranks make what rank 0 makes alone, but for rounding.

Samples in portions are held against the noise of a portion: what rank 0 makes of it alone deviates from the whole
forward by rounding only, in the same process with the same weights. For a split sequence nothing of the kind can be
measured on one device: its bound is the cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.closeness import bound, deviation
from deployments.engine.batching.merging import CannotMergeError, Merger


def is_close_enough(apart: float, whole: Any) -> bool:
    """By the cap."""
    return apart <= bound(whole, math.inf)


def wrong_portion(
    output: Any, whole: Any, sizes: Sequence[int], axes: BatchAxes, portion_alone: Callable[[int], Any]
) -> str | None:
    """Which portion of `output` is not that of `whole`, both along `axes` in portions of `sizes` samples; None: none.

    The first portion is rank 0's own, whose deviation is the noise. `portion_alone`: what rank 0 makes of one alone,
    asked for where the noise of the first is not enough.
    """
    merger = Merger(axes)
    try:
        made, right = merger.split(output, sizes), merger.split(whole, sizes)
    except CannotMergeError as error:
        return str(error)
    noise = deviation(made[0], right[0])
    if not is_close_enough(noise, right[0]):
        return f"its portion alone deviates by {noise:.1e}"
    for index in range(1, len(sizes)):
        apart = deviation(made[index], right[index])
        if apart <= bound(right[index], noise):
            continue
        own = deviation(portion_alone(index), right[index])
        if apart > bound(right[index], own):
            return f"portion {index} deviates by {apart:.1e}, where rank 0's deviates by {own:.1e}"
    return None
