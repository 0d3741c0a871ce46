"""Which axis of each argument and output of a forward is the batch: what grows when two samples are made for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Path = tuple[Any, ...]  # from the arguments' root to a value: ("hidden_states",) or ("x", 0)
Axis = int | Literal["same", "list", "bad"]
Call = tuple[dict[str, Any], Any]  # the arguments of a forward by name, and its output


@dataclass(frozen=True)
class BatchAxes:
    """The learned axes of one denoiser, by path; a path that is absent is the same for all samples."""

    arguments: dict[Path, Axis]
    outputs: dict[Path, Axis]


def axes_of_calls(one: Call, two: Call) -> BatchAxes:
    """The axes that differ between a call for one sample and the same call for two."""
    axes = BatchAxes({}, {})
    _compare(one[0], two[0], (), axes.arguments)
    _compare(one[1], two[1], (), axes.outputs)
    return axes


def _compare(one: Any, two: Any, path: Path, axes: dict[Path, Axis]) -> None:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and one.ndim == two.ndim:
        grown = [i for i in range(one.ndim) if one.shape[i] != two.shape[i]]
        if not grown:
            axes[path] = "same"
        else:
            axes[path] = grown[0] if len(grown) == 1 and two.shape[grown[0]] == 2 * one.shape[grown[0]] else "bad"
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if len(one) == len(two):
            for index, (a, b) in enumerate(zip(one, two, strict=True)):
                _compare(a, b, (*path, index), axes)
        else:
            axes[path] = "list" if len(two) == 2 * len(one) else "bad"
    elif isinstance(one, dict) and isinstance(two, dict):
        if one.keys() == two.keys():
            for name in one:
                _compare(one[name], two[name], (*path, name), axes)
        else:
            axes[path] = "bad"
    elif type(one) is not type(two):
        axes[path] = "bad"


def has_batch_axis(axes: BatchAxes) -> bool:
    """Whether an output can be split into those of its samples."""
    return any(axis == "list" or isinstance(axis, int) for axis in axes.outputs.values())


def num_batch_axes(learned: Mapping[str, BatchAxes]) -> int:
    """Arguments of all modules that follow the rule: of two ways to make two samples, the one with more is better."""
    return sum(axis not in ("same", "bad") for axes in learned.values() for axis in axes.arguments.values())
