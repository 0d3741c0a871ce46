"""What torch tells of a device's memory, by the functions that the modules of all its devices have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deployments.device_memory import DeviceMemory, device_memory, give_back_memory
from deployments.devices import Device

COUNTING = ("cuda", "xpu", "accelerator")  # modules of torch
FUNCTIONS = ("memory_allocated", "memory_reserved", "max_memory_allocated", "memory_stats", "empty_cache")


@pytest.mark.parametrize("name", COUNTING)
def test_torch_has_these_functions(name: str) -> None:
    assert all(callable(getattr(getattr(torch, name), function)) for function in FUNCTIONS)


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_torch_can_fence_memory(name: str) -> None:
    assert callable(getattr(torch, name).set_per_process_memory_fraction)


def test_memory_is_told_as_torch_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(
        memory_allocated=lambda: 3,
        memory_reserved=lambda: 5,
        max_memory_allocated=lambda: 4,
        memory_stats=lambda: {"num_ooms": 2},
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    device = Device("cuda", torch.device("cuda"))
    assert device_memory(device) == DeviceMemory(allocated=3, reserved=5, peak=4, out_of_memory=2)
    del module.memory_stats
    assert device_memory(device) == DeviceMemory(allocated=3, reserved=5, peak=4, out_of_memory=0)


def test_what_nobody_counts_is_not_told() -> None:
    assert device_memory(Device("cpu", torch.device("cpu"))) is None
    assert device_memory(Device("mps", torch.device("mps"))) is None
    give_back_memory(Device("cpu", torch.device("cpu")))
