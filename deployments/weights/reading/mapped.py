"""The tensors of a component's files, mapped into memory: pages of the files, which the host may drop again."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import torch
from safetensors import safe_open

from deployments.weights.files import WeightFile, WeightFiles
from deployments.weights.stream import TensorStream


def map_tensors(weights: WeightFiles, keep: bool) -> TensorStream:
    """Each tensor once, in the order of the files; `keep` is of no effect, since all stay valid."""
    for file in weights.files:
        with safe_open(file.location, framework="pt") as opened:
            for name in in_order(file):
                yield name, opened.get_tensor(name)


def in_order(file: WeightFile) -> list[str]:
    """Its tensors as they lie in it: what is read ahead is of use."""
    offsets = {name: entry["data_offsets"] for name, entry in file.entries.items()}
    return [name for name, _ in sorted(offsets.items(), key=itemgetter(1))]


class Mapped:
    """A tensor that is brought to the device when somebody takes its elements, `mapped[...]`, and not held here."""

    def __init__(self, opened: Any, name: str, device: torch.device) -> None:
        self._opened, self._name, self._device = opened, name, device

    def __getitem__(self, _: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._opened.get_tensor(self._name)
        return tensor.to(self._device)


def mapped_by_name(weights: WeightFiles, device: torch.device) -> dict[str, Mapped]:
    found: dict[str, Mapped] = {}
    for file in weights.files:
        opened = safe_open(file.location, framework="pt")
        found |= {name: Mapped(opened, name, device) for name in in_order(file)}
    return found
