"""How far a merged forward is from the lone one, and how far it may be: a few times what rounding alone does."""

from __future__ import annotations

import math
from typing import Any

import torch

from deployments.tensors.values import tensors

NOISE_MARGIN = 3.0  # times the noise floor, which one pair of calls does not show at its largest
# Relative L2, for forwards that a batch does not change at all but for a kernel of another tile: a part of the rounding
# of one value (bfloat16: 2 ** -9).
SMALLEST = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}
# What no noise floor excuses: with a wrong axis, a forward merged with itself may deviate as much as one merged with
# another.
LARGEST = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def deviation(merged: Any, alone: Any) -> float:
    """The largest relative L2 distance of two outputs' tensors; inf where they differ in kind or in what is finite."""
    pairs = list(zip(tensors(merged), tensors(alone), strict=True))
    return max((_distance(a, b) for a, b in pairs), default=0.0)


def is_close(merged: Any, alone: Any, noise: float) -> bool:
    """Whether a merged forward's output is the lone one's but for rounding.

    `noise` is the deviation of the same forward merged with itself.
    """
    return deviation(merged, alone) <= bound(alone, noise)


def bound(alone: Any, noise: float) -> float:
    """Of the deviation, for an output of these dtypes; the coarsest of them decides."""
    dtypes = [t.dtype for t in tensors(alone) if t.is_floating_point()]
    smallest = max((SMALLEST.get(dtype, SMALLEST[torch.bfloat16]) for dtype in dtypes), default=0.0)
    largest = max((LARGEST.get(dtype, LARGEST[torch.bfloat16]) for dtype in dtypes), default=0.0)
    return min(max(NOISE_MARGIN * noise, smallest), largest)


def is_same(a: Any, b: Any) -> bool:
    """Whether two outputs have the same bits; NaN is like NaN."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in pairs)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    # What one sample has made NaN of itself stays NaN; it may not spread to others.
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    precision = torch.float64 if b.dtype == torch.float64 else torch.float32
    a, b = (x.nan_to_num(0.0, 0.0, 0.0).to(precision) for x in (a, b))
    apart, length = float((a - b).norm()), float(b.norm())
    return 0.0 if apart == 0.0 else apart / length if length else math.inf
