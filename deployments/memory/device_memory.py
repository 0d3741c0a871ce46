"""How much memory a process may still take of its device, where the device tells."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Room:
    """Bytes of a device's memory as one process sees them."""

    free: int  # that it could take now, what its allocator holds without use among them
    most: int  # that it could ever take, were nobody else there


class DeviceMemory(Protocol):
    """The memory of the device of a stage."""

    def room(self) -> Room | None:
        """None where the device does not tell."""
        ...

    def give_back(self) -> None:
        """Gives what Python and the allocator hold without using it back to the device."""
        ...


class TorchMemory:
    """That of a device as torch knows it; CPUs and others without a count of their own do not tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)

    def room(self) -> Room | None:
        asked = getattr(self._module, "mem_get_info", None)
        if asked is None:
            return None
        free, total = map(int, asked())
        allocated, reserved = self._count("memory_allocated"), self._count("memory_reserved")
        most = int(total * self._fraction())
        return Room(max(0, min(free + reserved - allocated, most - allocated)), most)

    def give_back(self) -> None:
        gc.collect()
        if (empty_cache := getattr(self._module, "empty_cache", None)) is not None:
            empty_cache()

    def _count(self, name: str) -> int:
        count = getattr(self._module, name, None)
        return int(count()) if count is not None else 0

    def _fraction(self) -> float:
        """The share of the device that torch lets this process take."""
        asked = getattr(self._module, "get_per_process_memory_fraction", None)
        return float(asked()) if asked is not None else 1.0


class UncountedMemory:
    """Of a device that nobody asks."""

    def room(self) -> Room | None:
        return None

    def give_back(self) -> None:
        gc.collect()
