"""A replica takes its share of a device: it starts with one only, keeps to it where asked, and gives back when idle."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.accelerators import ACCELERATORS
from deployments.devices import Device, DeviceError
from deployments.replicas.device_share import IDLE_S, IdleMemory, claim_share


def device(name: str) -> Device:
    return Device(name, torch.device("meta"))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch's module of the device, which notes what is asked of it."""
    asked: list[Any] = []
    module = SimpleNamespace(
        asked=asked,
        set_per_process_memory_fraction=asked.append,
        empty_cache=lambda: asked.append("empty_cache"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    return module


@pytest.mark.parametrize("name", ACCELERATORS)
@pytest.mark.parametrize("share", [0.0, 2.0])
def test_a_replica_with_no_device_or_too_many_does_not_start(name: str, share: float) -> None:
    resource = ACCELERATORS[name].resource
    with pytest.raises(DeviceError) as refused:
        claim_share(device(name), {"CPU": 1.0, resource: share} if share else {"CPU": 1.0}, fence=False)
    sentence = str(refused.value)
    assert ACCELERATORS[name].field in sentence
    assert f"is {share:g}: " in sentence
    assert "above 0 and at most 1" in sentence


def test_a_replica_on_a_cpu_needs_none(module: SimpleNamespace) -> None:
    assert claim_share(Device("cpu", torch.device("cpu")), {}, fence=False) is None
    with pytest.raises(DeviceError, match="fence_device_memory is true: with SGLANG_DIFFUSION_TARGET_DEVICE=cpu"):
        claim_share(Device("cpu", torch.device("cpu")), {}, fence=True)


@pytest.mark.parametrize(
    ("share", "fence", "asked"), [(0.3, True, [0.3]), (0.3, False, []), (1.0, True, []), (1.0, False, [])]
)
def test_memory_is_fenced_to_the_share_where_it_is_asked_for(
    share: float, fence: bool, asked: list[float], module: SimpleNamespace
) -> None:
    assert claim_share(device("cuda"), {"GPU": share}, fence) == share
    assert module.asked == asked


def test_a_device_whose_memory_cannot_be_fenced_is_refused(module: SimpleNamespace) -> None:
    del module.set_per_process_memory_fraction
    with pytest.raises(DeviceError, match=r"fence_device_memory is true: with .*=musa torch .* so it must be false"):
        claim_share(device("musa"), {"GPU": 0.5}, fence=True)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_idle_replica_gives_back_once_what_it_keeps_of_a_shared_device(module: SimpleNamespace) -> None:
    clock = Clock()
    idle = IdleMemory(device("cuda"), 0.3, clock)
    assert not idle.is_due(None), "during a work"
    ended = clock.now
    assert not idle.is_due(ended), "another work may follow"
    clock.now += IDLE_S
    assert idle.is_due(ended)
    assert not idle.is_due(ended), "it has"
    clock.now += 2 * IDLE_S
    assert idle.is_due(ended + IDLE_S), "after a work between two looks, however short"
    idle.give_back()
    assert module.asked == ["empty_cache"]


@pytest.mark.parametrize("share", [None, 1.0])
def test_a_replica_that_has_its_device_for_itself_keeps_its_memory(share: float | None) -> None:
    clock = Clock()
    idle = IdleMemory(device("cuda"), share, clock)
    clock.now += 1000
    assert not idle.is_due(100.0)


def test_a_device_that_gives_nothing_back_stops_nobody(
    module: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    def dead() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    module.empty_cache = dead
    give_back: Callable[[], None] = IdleMemory(device("cuda"), 0.3).give_back
    give_back()
    assert "was not given back" in caplog.text
