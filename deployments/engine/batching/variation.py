"""A forward like another that differs from a third in every argument: only then does a merge show each wrong axis."""

from __future__ import annotations

from typing import Any

import torch

from deployments.engine.batching.axes import Path
from deployments.engine.batching.merging import Merger
from deployments.tensors.arguments import TIME_PARAMETERS

SCALE = 15 / 16  # of what has one value for each sample, such as a time step or a guidance scale


def varied(
    arguments: dict[str, Any], other: dict[str, Any], merger: Merger, num_samples: int, shared: frozenset[Path]
) -> dict[str, Any] | None:
    """The arguments, changed where they equal the other's and have an axis of the batch; None: they differ already.

    Only floating point numbers and time steps are changed: there may be no other token or mask that the model takes.
    """
    changed = 0

    def of(value: Any, beside: Any, path: Path, in_batch: bool) -> Any:
        nonlocal changed
        axis = "same" if not in_batch and path in shared else merger.axis(path, value, num_samples, shared)
        if isinstance(value, torch.Tensor):
            is_time = path[0] in TIME_PARAMETERS
            if (in_batch or is_time or axis != "same") and _are_equal(value, beside, is_time):
                changed += 1
                return _changed(value, is_time)
            return value
        if isinstance(value, list | tuple) and isinstance(beside, list | tuple) and len(value) == len(beside):
            items = zip(value, beside, strict=True)
            return type(value)(of(x, y, (*path, i), in_batch or axis == "list") for i, (x, y) in enumerate(items))
        if isinstance(value, dict) and isinstance(beside, dict):
            return {n: of(x, beside.get(n), (*path, n), in_batch) for n, x in value.items()}
        return value

    made = {name: of(value, other.get(name), (name,), False) for name, value in arguments.items()}
    return made if changed else None


def _are_equal(value: torch.Tensor, beside: Any, is_time: bool) -> bool:
    """Whether there is something to change."""
    is_like = isinstance(beside, torch.Tensor) and beside.shape == value.shape and beside.dtype == value.dtype
    return is_like and (is_time or value.is_floating_point()) and bool(value.any()) and torch.equal(value, beside)


def _changed(value: torch.Tensor, is_time: bool) -> torch.Tensor:
    """Another order of the numbers, which no norm undoes."""
    if not is_time and value.ndim > 1 and value.shape[-1] > 1:
        return value.flip(-1)
    return (value * SCALE).to(value.dtype)
