"""The memory that this process has on its device: counted, given back, and kept within a share of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deployments.accelerators import VARIABLE
from deployments.devices import Device, DeviceError


@dataclass(frozen=True)
class DeviceMemory:
    """Of this process on its device, by torch's allocator; bytes, but for the last."""

    allocated: int  # by tensors
    reserved: int  # with what the allocator keeps for later tensors
    peak: int  # the most that was allocated at one time, since the start
    out_of_memory: int  # times that the device had less than was asked for, since the start


def device_memory(device: Device) -> DeviceMemory | None:
    """None where torch does not count it: on CPUs, and on Metal, which knows no peak."""
    module = _module_of(device)
    if not hasattr(module, "max_memory_allocated"):
        return None
    counted = module.memory_stats() if hasattr(module, "memory_stats") else {}
    return DeviceMemory(
        allocated=int(module.memory_allocated()),
        reserved=int(module.memory_reserved()),
        peak=int(module.max_memory_allocated()),
        out_of_memory=int(counted.get("num_ooms", 0)),
    )


def give_back_memory(device: Device) -> None:
    """Gives the device back what the allocator keeps for later tensors: other processes may take it."""
    module = _module_of(device)
    if hasattr(module, "empty_cache"):
        module.empty_cache()


def limit_memory(device: Device, share: float) -> None:
    """From now on tensors of this process take at most that share of the device's memory, from 0 to 1.

    Raises DeviceError where torch cannot limit it.
    """
    module = _module_of(device)
    if not hasattr(module, "set_per_process_memory_fraction"):
        raise DeviceError(
            f"fence_device_memory is true: with {VARIABLE}={device.name} torch {torch.__version__} can limit no "
            "memory, so it must be false"
        )
    module.set_per_process_memory_fraction(share)


def _module_of(device: Device) -> Any:
    """torch's own of that kind of device; None for CPUs."""
    return None if device.torch_device.type == "cpu" else torch.get_device_module(device.torch_device)
