"""Calls of a module that are made later, perhaps by another process: what each is given and takes of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deployments.tensors.values import leaves, map_values, tensors


@dataclass(frozen=True)
class Taken:
    """A tensor that an earlier call has returned, or left in what it was given: leaves in the order of `leaves`."""

    place: int  # among the leaves of (args, kwargs) of the call that takes it
    call: int  # index in the chain
    leaf: int  # among those of (output, args, kwargs) of the earlier call, after it


@dataclass(frozen=True)
class Call:
    """One call; where it takes tensors of earlier calls, None stands for them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    taken: tuple[Taken, ...] = ()
    wanted: tuple[int, ...] = ()  # leaves of its output that are used outside of the chain

    @property
    def cost(self) -> int:
        """In numbers that it is given: what tiles of one autoencoder cost is in proportion."""
        return sum(tensor.numel() for tensor in tensors((self.args, self.kwargs)))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the first tensor that it is given: of the tile."""
        return shape_of((self.args, self.kwargs))


def shape_of(value: Any) -> tuple[int, ...] | None:
    """Of the first tensor of a tree."""
    return next((tuple(leaf.shape) for leaf in leaves(value) if isinstance(leaf, torch.Tensor)), None)


Chain = tuple[Call, ...]  # calls that take from each other, in their order


def made(module: Callable[..., Any], chain: Chain) -> list[list[torch.Tensor]]:
    """Makes the calls of a chain: the wanted tensors of each."""
    outputs: list[list[torch.Tensor]] = []
    left: dict[int, list[Any]] = {}  # by call: its leaves, as long as a later call takes one
    for index, call in enumerate(chain):
        args, kwargs = _given(call, left)
        output = module(*args, **kwargs)
        outputs.append([leaf for n, leaf in enumerate(leaves(output)) if n in call.wanted])
        left[index] = list(leaves((output, args, kwargs)))
        needed = {taken.call for later in chain[index + 1 :] for taken in later.taken}
        left = {earlier: kept for earlier, kept in left.items() if earlier in needed}
    return outputs


def _given(call: Call, left: dict[int, list[Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """In containers of its own, which the module may write into."""
    taken = {each.place: left[each.call][each.leaf] for each in call.taken}
    places: Iterator[int] = iter(range(2**62))

    def leaf(value: Any) -> Any:
        place = next(places)
        return taken.get(place, value)

    args, kwargs = map_values(leaf, (call.args, call.kwargs))
    return args, kwargs


def to_message(chain: Chain) -> list[dict[str, Any]]:
    """On the host, as a rank is sent it."""
    return [
        {
            "args": _on(torch.device("cpu"), call.args),
            "kwargs": _on(torch.device("cpu"), call.kwargs),
            "taken": [[each.place, each.call, each.leaf] for each in call.taken],
            "wanted": list(call.wanted),
        }
        for call in chain
    ]


def of_message(message: Sequence[dict[str, Any]], device: torch.device) -> Chain:
    """The chain that was sent, its tensors on the device of this rank, in memory that begins where torch's does."""
    return tuple(
        Call(
            tuple(_on(device, each["args"], copy=True)),
            _on(device, each["kwargs"], copy=True),
            tuple(Taken(*taken) for taken in each["taken"]),
            tuple(each["wanted"]),
        )
        for each in message
    )


def _on(device: torch.device, value: Any, copy: bool = False) -> Any:
    return map_values(lambda leaf: leaf.to(device, copy=copy) if isinstance(leaf, torch.Tensor) else leaf, value)
