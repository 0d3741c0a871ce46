"""The samples of a forward in portions, and the outputs of the portions as one, along the batch axes of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deployments.engine.batching.axes import Axis, BatchAxes, Path
from deployments.tensors.values import is_output, output_fields, rebuilt_output


class NoPortionsError(Exception):
    """The forward's samples cannot be told apart: it is made as a whole."""


def portion_sizes(num_samples: int, num_portions: int) -> list[int]:
    """As even as can be, the larger ones first; at most one portion for each sample."""
    size, rest = divmod(num_samples, num_portions)
    return [size + (index < rest) for index in range(min(num_samples, num_portions))]


def portions(arguments: dict[str, Any], axes: BatchAxes, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The arguments of each portion, its tensors views; raises NoPortionsError."""
    parts: list[dict[str, Any]] = _portions(arguments, (), axes, sizes)
    return parts


def joined(outputs: Sequence[Any], axes: BatchAxes, path: Path = ()) -> Any:
    """The output of the whole forward; raises NoPortionsError."""
    first = outputs[0]
    axis = axes.outputs.get(path, "same")
    if isinstance(first, torch.Tensor):
        if axis == "same" and all(torch.equal(first, other) for other in outputs[1:]):
            return first
        if not isinstance(axis, int):
            raise NoPortionsError(f"output {path} follows no rule")
        return torch.cat(list(outputs), axis)
    if is_output(first):
        names = output_fields(first)
        fields = {n: joined([getattr(output, n) for output in outputs], axes, (*path, n)) for n in names}
        return rebuilt_output(type(first), fields)
    if isinstance(first, dict):
        return {n: joined([output[n] for output in outputs], axes, (*path, n)) for n in first}
    if isinstance(first, list | tuple):
        if axis == "list":
            return type(first)(item for output in outputs for item in output)
        return type(first)(joined(items, axes, (*path, i)) for i, items in enumerate(zip(*outputs, strict=True)))
    if any(type(other) is not type(first) or other != first for other in outputs[1:]):
        raise NoPortionsError(f"output {path} is another one for each sample")
    return first


def _portions(value: Any, path: Path, axes: BatchAxes, sizes: Sequence[int]) -> list[Any]:
    axis = axes.arguments.get(path, "same")
    if isinstance(value, torch.Tensor):
        return _portions_of_tensor(value, path, axis, sizes)
    if isinstance(value, list | tuple):
        if axis == "list":
            return [type(value)(value[start:end]) for start, end in _bounds(len(value), path, sizes)]
        columns = [_portions(item, (*path, index), axes, sizes) for index, item in enumerate(value)]
        return [type(value)(column[i] for column in columns) for i in range(len(sizes))]
    if isinstance(value, dict):
        items = {name: _portions(item, (*path, name), axes, sizes) for name, item in value.items()}
        return [{name: parts[i] for name, parts in items.items()} for i in range(len(sizes))]
    if axis == "bad":
        raise NoPortionsError(f"argument {path} follows no rule")
    return [value] * len(sizes)


def _portions_of_tensor(value: torch.Tensor, path: Path, axis: Axis, sizes: Sequence[int]) -> list[torch.Tensor]:
    # What is one number for a lone forward is one for each sample in a batch: a time step, a guidance scale.
    if axis == "same" and value.ndim == 1 and value.numel() == sum(sizes):
        axis = 0
    if axis == "same":
        return [value] * len(sizes)
    if not isinstance(axis, int) or axis >= value.ndim:
        raise NoPortionsError(f"argument {path} follows no rule")
    return [value.narrow(axis, start, end - start) for start, end in _bounds(value.shape[axis], path, sizes)]


def _bounds(length: int, path: Path, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    rows, rest = divmod(length, sum(sizes))
    if rest:
        raise NoPortionsError(f"argument {path} has no rows of its own for each sample")
    start = 0
    for size in sizes:
        yield start, start + size * rows
        start += size * rows
