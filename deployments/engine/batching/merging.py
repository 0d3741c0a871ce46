"""How several forwards become one: which axis of each argument is the batch, and whether that is true.

Batch axes are learned from the calls for one and for two samples (axes.py) or, where nobody could make these calls,
guessed. Either way the first merge of every structure of arguments is held against lone forwards (trial.py), so a wrong
axis costs time and never a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deployments.engine.batching.axes import Axis, BatchAxes, Path
from deployments.engine.batching.equality import ProvenEqual
from deployments.tensors.arguments import LATENT_PARAMETERS, TIME_PARAMETERS
from deployments.tensors.values import PLAIN, copied, is_output, output_fields, rebuilt_output

CONSTANT = (*PLAIN, torch.dtype, torch.device)
LENGTH_STEP = 32  # lengths of texts up to the next multiple may share a batch: models pad to such steps


class CannotMergeError(Exception):
    """These forwards have an argument or an output that cannot be merged; they run alone."""


class Merger:
    """Keys, merges and splits the forwards of one module; `axes` None: they are guessed.

    The samples of a batch lie forward after forward, or `by_position`: the first sample of each forward, then the
    second of each. Pipelines stack several pictures by position, all without guidance before all with it, and what
    tells the parts of a batch by their place in it works on no other order. Each forward must have as many samples.
    """

    def __init__(
        self, axes: BatchAxes | None, by_position: bool = False, are_equal: Callable[..., bool] | None = None
    ) -> None:
        """`are_equal` compares two tensors, by their numbers where it does not know them (ProvenEqual)."""
        self.axes = axes
        self.by_position = by_position
        self._are_equal = are_equal or ProvenEqual()

    def num_samples(self, arguments: dict[str, Any]) -> int:
        """Samples in one forward (two where guidance is stacked)."""
        for name in (*LATENT_PARAMETERS, *arguments):
            value = arguments.get(name)
            axis: Axis = self.axes.arguments.get((name,), "same") if self.axes else 0
            if isinstance(value, list) and (axis == "list" or self.axes is None):
                return len(value)
            if isinstance(value, torch.Tensor) and isinstance(axis, int) and value.ndim:
                return value.shape[axis]
        return 1

    def structure(self, arguments: dict[str, Any], num_samples: int) -> Path:
        """Equal for forwards that may be merged; raises CannotMergeError for those that may not."""
        return tuple((name, self._structure(v, (name,), num_samples)) for name, v in sorted(arguments.items()))

    def _structure(self, value: Any, path: Path, num_samples: int) -> Any:
        axis = self.axis(path, value, num_samples, frozenset())
        if axis == "bad":
            raise CannotMergeError(f"argument {path} follows no rule")
        if isinstance(value, torch.Tensor):
            if axis == "same":
                return ("one",) if value.numel() == 1 else ("same", tuple(value.shape), value.dtype)
            assert isinstance(axis, int)
            others = (*value.shape[:axis], *value.shape[axis + 1 :])
            rows, rest = divmod(value.shape[axis], num_samples)
            if rest and self.by_position:
                raise CannotMergeError(f"argument {path} has no rows of its own for each sample")
            return axis, others, rows if not rest else ("odd", value.shape[axis]), value.dtype
        if axis == "list":
            return "list", _kinds_of_items(value, path[0] in LATENT_PARAMETERS)
        if isinstance(value, list | tuple):
            items = tuple(self._structure(x, (*path, i), num_samples) for i, x in enumerate(value))
            return (type(value).__name__, *items)
        if isinstance(value, dict):
            return ("dict", *((n, self._structure(x, (*path, n), num_samples)) for n, x in value.items()))
        if not isinstance(value, CONSTANT):
            raise CannotMergeError(f"argument {path} is a {type(value).__name__}, the state of one caller")
        return "constant", repr(value)

    def is_even(self, forwards: Sequence[dict[str, Any]]) -> bool:
        """Whether each sample of these has as many rows as any other in every argument.

        Forwards of one structure have the same shapes but for the lengths in lists of samples.
        """
        num_samples = self.num_samples(forwards[0])
        return all(self._is_even([f[n] for f in forwards], (n,), num_samples) for n in forwards[0])

    def _is_even(self, values: list[Any], path: Path, num_samples: int) -> bool:
        first = values[0]
        if not isinstance(first, list | tuple | dict):
            return True
        if self.axis(path, first, num_samples, frozenset()) == "list":
            items = [item for value in values for item in value]
            return len({tuple(tensor.shape for _, tensor in _flat(item, ())) for item in items}) <= 1
        names = list(first) if isinstance(first, dict) else range(len(first))
        return all(self._is_even([value[name] for value in values], (*path, name), num_samples) for name in names)

    def merge(
        self, forwards: Sequence[dict[str, Any]], counts: Sequence[int], shared: frozenset[Path] = frozenset()
    ) -> dict[str, Any]:
        """One set of arguments; `shared` paths are passed once (they must be equal)."""
        return {n: self._merge([f[n] for f in forwards], (n,), counts, shared) for n in forwards[0]}

    def _merge(self, values: list[Any], path: Path, counts: Sequence[int], shared: frozenset[Path]) -> Any:
        first = values[0]
        axis = self.axis(path, first, counts[0], shared)
        if isinstance(first, torch.Tensor):
            return self._merge_tensors(values, axis, path, counts)
        if axis == "list":
            return self._joined_lists(values, counts)
        if isinstance(first, list | tuple):
            columns = enumerate(zip(*values, strict=True))
            return type(first)(self._merge(list(c), (*path, i), counts, shared) for i, c in columns)
        if isinstance(first, dict):
            return {n: self._merge([v[n] for v in values], (*path, n), counts, shared) for n in first}
        return first

    def _merge_tensors(self, values: list[torch.Tensor], axis: Axis, path: Path, counts: Sequence[int]) -> torch.Tensor:
        first = values[0]
        if axis != "same":
            assert isinstance(axis, int)
            return self._joined(values, axis, counts)
        is_time = path[0] in TIME_PARAMETERS and first.numel() == 1
        # A time step is seldom equal, and to ask would wait for the device at every step: always one for each sample.
        if not is_time and all(self._are_equal(first, value) for value in values[1:]):
            if self.axes is not None or first.ndim:
                return first
            return torch.cat([v.expand(n) for v, n in zip(values, counts, strict=True)])
        if first.numel() == 1:
            return self._joined([v.reshape(1).expand(n) for v, n in zip(values, counts, strict=True)], 0, counts)
        raise CannotMergeError(f"{path} differs between the forwards and has no batch axis")

    def _joined(self, values: Sequence[torch.Tensor], axis: int, counts: Sequence[int]) -> torch.Tensor:
        joined = torch.cat(list(values), axis)
        if not self.by_position:
            return joined
        parts: torch.Tensor = joined.unflatten(axis, (len(counts), counts[0], -1))
        return parts.transpose(axis, axis + 1).flatten(axis, axis + 2)

    def _joined_lists(self, values: Sequence[list[Any]], counts: Sequence[int]) -> list[Any]:
        if not self.by_position:
            return [item for value in values for item in value]
        portions = [_portions(value, [1] * counts[0]) for value in values]
        return [item for at_position in zip(*portions, strict=True) for portion in at_position for item in portion]

    def _separated(self, output: torch.Tensor, axis: int, counts: Sequence[int]) -> list[torch.Tensor]:
        rows = output.shape[axis] // sum(counts)
        if not self.by_position:
            return list(output.split([n * rows for n in counts], axis))
        parts = output.unflatten(axis, (counts[0], len(counts), rows))
        return [part.flatten(axis, axis + 1) for part in parts.unbind(axis + 1)]

    def _separated_lists(self, output: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
        if not self.by_position:
            return _portions(output, counts)
        samples = _portions(output, [1] * sum(counts))
        return [[item for sample in samples[i :: len(counts)] for item in sample] for i in range(len(counts))]

    def split(self, output: Any, counts: Sequence[int], path: Path = ()) -> list[Any]:
        """The output of a merged forward as one output for each of them; raises CannotMergeError where it cannot be."""
        total = sum(counts)
        if isinstance(output, torch.Tensor):
            axis = self.axes.outputs.get(path, "same") if self.axes else 0
            if axis == "same":
                return [output, *(copied(output) for _ in counts[1:])]  # each may change its own
            if not isinstance(axis, int) or output.shape[axis] % total:
                raise CannotMergeError(f"output {path} follows no rule")
            return self._separated(output, axis, counts)
        if is_output(output):
            names = output_fields(output)
            columns = [self.split(getattr(output, n), counts, (*path, n)) for n in names]
            return [rebuilt_output(type(output), dict(zip(names, c, strict=True))) for c in zip(*columns, strict=True)]
        if isinstance(output, list | tuple):
            if self._is_list_of_samples(output, path, total):
                return self._separated_lists(output, counts)
            columns = [self.split(v, counts, (*path, i)) for i, v in enumerate(output)]
            return [type(output)(c) for c in zip(*columns, strict=True)]
        if not isinstance(output, CONSTANT):
            raise CannotMergeError(f"output {path} is a {type(output).__name__}")
        return [output] * len(counts)

    def _is_list_of_samples(self, output: Any, path: Path, total: int) -> bool:
        if self.axes is not None:
            return self.axes.outputs.get(path) == "list"
        return isinstance(output, list) and len(output) == total

    def axis(self, path: Path, value: Any, num_samples: int, shared: frozenset[Path]) -> Axis:
        """Of this argument, where `shared` ones are passed once."""
        if self.axes is not None:
            return self.axes.arguments.get(path, "same")
        if path in shared:
            return "same"
        if isinstance(value, torch.Tensor):
            return 0 if value.ndim and value.shape[0] and value.shape[0] % num_samples == 0 else "same"
        return "list" if isinstance(value, list) and len(value) == num_samples else "same"

    def shared_guesses(self, forwards: Sequence[dict[str, Any]]) -> list[frozenset[Path]]:
        """Sets of arguments to pass once, to be tried in this order; with learned axes there is nothing to guess."""
        if self.axes is not None:
            return [frozenset()]
        flat = [dict(_flat(arguments, ())) for arguments in forwards]
        equal = frozenset(
            path
            for path, tensor in flat[0].items()
            if path[0] not in TIME_PARAMETERS
            and path[0] not in LATENT_PARAMETERS
            and all(path in f and f[path].shape == tensor.shape and torch.equal(f[path], tensor) for f in flat)
        )
        narrow = frozenset(p for p in equal if flat[0][p].ndim == 1 or not flat[0][p].is_floating_point())
        return list(dict.fromkeys([frozenset(), narrow, equal]))


def _kinds_of_items(samples: Sequence[Any], are_latents: bool) -> Any:
    """What the samples of a list have in common, one kind where all are alike: how many there are tells nothing."""
    kinds = [_kind(sample, are_latents) for sample in samples]
    return kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else ("several", *kinds)


def _kind(value: Any, are_latents: bool) -> Any:
    """Models pad each sample to the longest of the batch: latents of another size would cost all of them the largest.

    Of a text [L, D] the length may differ up to the next step.
    """
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
        if not are_latents and len(shape) == 2:
            shape = (-(-shape[0] // LENGTH_STEP) * LENGTH_STEP, shape[1])
        return shape, value.dtype
    if isinstance(value, list | tuple):
        return type(value).__name__, *(_kind(item, are_latents) for item in value)
    return type(value).__name__


def _portions(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    portions, start, per_sample = [], 0, len(values) // sum(counts)
    for count in counts:
        portions.append(list(values[start : start + count * per_sample]))
        start += count * per_sample
    return portions


def _flat(value: Any, path: Path) -> Iterator[tuple[Path, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _flat(child, (*path, name))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _flat(child, (*path, index))
