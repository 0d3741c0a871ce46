"""Where two trees of values differ: which tensor, how many of its elements, by how much, and where first."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.tensors.values import Anything, Opaque, is_output, is_record, output_fields, parts
from deployments.verify.verdict import Difference

TINY = 1e-12  # the largest value of a tensor is taken to be at least this


def differences(made: Any, truth: Any, place: str) -> list[Difference]:
    """Of two trees, in their order; empty where every number has the same value. NaN is equal to NaN.

    Objects that never leave their process, such as caches, are not compared.
    """
    return list(_differences(made, truth, place))


def largest(found: list[Difference] | tuple[Difference, ...]) -> float | None:
    """The largest relative deviation, 0.0 for none; None where one of them has no number."""
    relative = [difference.relative for difference in found]
    return None if None in relative else max((each for each in relative if each is not None), default=0.0)


def _differences(made: Any, truth: Any, place: str) -> Iterator[Difference]:
    if any(isinstance(value, Anything | Opaque) for value in (made, truth)):
        return
    opened, wanted = parts(made), parts(truth)
    if opened is None and wanted is None:
        yield from _of_leaves(made, truth, place)
    elif opened is None or wanted is None:
        yield Difference(place, f"a {type(made).__name__} in place of a {type(truth).__name__}")
    elif (names := _names(made, len(opened[0]))) != (known := _names(truth, len(wanted[0]))):
        yield Difference(place, f"{', '.join(names) or 'nothing'} in place of {', '.join(known) or 'nothing'}")
    else:
        for name, child, other in zip(names, opened[0], wanted[0], strict=True):
            yield from _differences(child, other, place + name)


def _names(value: Any, count: int) -> list[str]:
    """Of the children that `parts` gives, as they are added to a place."""
    if is_output(value):
        return [f".{name}" for name in output_fields(value)]
    if isinstance(value, dict | UserDict):
        return [f".{name}" for name in value]
    return [f".{name}" for name in vars(value)] if is_record(value) else [f"[{index}]" for index in range(count)]


def _of_leaves(made: Any, truth: Any, place: str) -> Iterator[Difference]:
    numbers, wanted = as_tensor(made), as_tensor(truth)
    if numbers is not None and wanted is not None:
        yield from _of_tensors(numbers, wanted, place)
    elif type(made) is not type(truth):
        yield Difference(place, f"a {type(made).__name__} in place of a {type(truth).__name__}")
    elif isinstance(made, bool | int | float | str | bytes) and made != truth:
        yield Difference(place, f"{made!r} in place of {truth!r}")


def as_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu")
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Image.Image):
        value = np.asarray(value)
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) and value.dtype != object else None


def _of_tensors(made: torch.Tensor, truth: torch.Tensor, place: str) -> Iterator[Difference]:
    if made.shape != truth.shape or made.dtype != truth.dtype:
        yield Difference(place, f"{_kind(made)} in place of {_kind(truth)}")
        return
    differ = (made != truth) & ~(made.isnan() & truth.isnan())
    count = int(differ.sum())
    if not count:
        return
    first = tuple(int(i) for i in differ.nonzero()[0])
    exact, wanted = (_exact(each) for each in (made, truth))
    deviation = float((exact - wanted).abs()[differ].max())
    relative = deviation / max(float(wanted.abs().max()), TINY)
    is_number = bool(exact[differ].isfinite().all() and wanted.isfinite().all())
    by = f"at most {deviation:.2e}, {relative:.1e} of its largest value" if is_number else "NaN or infinite"
    where = f"first at {list(first)}: {made[first].item():.6g} in place of {truth[first].item():.6g}"
    yield Difference(
        place, f"{count} of {made.numel()} elements differ by {by}; {where}", relative if is_number else None
    )


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
