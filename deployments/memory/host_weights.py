"""The weights of a component on the host, of which a second copy is on the device for a while."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)  # not those of quantisers, whose numbers are in tensors inside
Place = tuple[dict[str, Any], str]  # a module's table of parameters or buffers, and the name in it


class HostWeights:
    """Those of one module. They come to the device and go back as often as is asked; the host has a copy all the time.

    Going back costs no copy but for what was changed on the device.
    """

    def __init__(self, module: torch.nn.Module, pin_memory: bool = False) -> None:
        """What is on the meta device stays there: this stage does not run it."""
        places: dict[int, list[Place]] = {}
        for table, name in _places(module):
            places.setdefault(id(table[name]), []).append((table, name))
        self._weights = [_Weight(tuple(same), same[0][0][same[0][1]]) for same in places.values()]
        for weight in self._weights:
            weight.begin(pin_memory)

    def to(self, device: torch.device) -> None:
        for weight in self._weights:
            weight.come(device)

    def back(self) -> None:
        """Also where only some of them had come."""
        for weight in self._weights:
            weight.go()


@dataclass
class _Weight:
    """One tensor, which several modules may share."""

    places: tuple[Place, ...]
    tensor: Any  # the object that stands in the modules while it is on the host
    numbers: torch.Tensor | None = None  # on the host; None: of a quantiser's tensor, which is moved as a whole
    arrived: Any = None  # how it was when it came to the device; None: it is on the host

    @torch.no_grad()
    def begin(self, pin_memory: bool) -> None:
        if type(self.tensor) in PLAIN:
            numbers = self.tensor.detach().cpu()
            self.numbers = numbers.pin_memory() if pin_memory and numbers.numel() else numbers
            self.tensor.data = self.numbers

    @torch.no_grad()
    def come(self, device: torch.device) -> None:
        source = self.tensor if self.numbers is None else self.numbers
        moved = source.to(device, non_blocking=source.is_pinned())
        if self.numbers is not None and torch._has_compatible_shallow_copy_type(self.tensor, moved):
            self.tensor.data = moved  # the same object, as torch's own moves leave it
        else:
            self._put(_like(self.tensor, moved))
        self.arrived = _state(self._current())

    @torch.no_grad()
    def go(self) -> None:
        if self.arrived is None:
            return
        current = self._current()
        if _state(current) != self.arrived:  # cast, exchanged or written into
            self._keep(current)
        elif self.numbers is not None:
            self.tensor.data = self.numbers
        self._put(self.tensor)
        self.arrived = None

    def _keep(self, current: Any) -> None:
        """What it has become on the device is what it is from now on."""
        numbers = current.detach().to("cpu")
        self.numbers = numbers if type(numbers) is torch.Tensor else None
        if type(current) in PLAIN:
            current.data = numbers
            self.tensor = current
        else:
            self.tensor = _like(current, numbers)

    def _current(self) -> Any:
        table, name = self.places[0]
        return table[name]

    def _put(self, tensor: Any) -> None:
        for table, name in self.places:
            table[name] = tensor


def _places(module: torch.nn.Module) -> Iterator[Place]:
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.device.type != "meta":
                    yield table, name


def _like(tensor: Any, moved: torch.Tensor) -> Any:
    """A parameter where it was one."""
    is_parameter = isinstance(tensor, torch.nn.Parameter) and not isinstance(moved, torch.nn.Parameter)
    return torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved


def _state(tensor: Any) -> tuple[int, int, torch.dtype, int]:
    return id(tensor), tensor._version, tensor.dtype, tensor.untyped_storage()._cdata
