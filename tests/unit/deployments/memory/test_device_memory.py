"""What a process may still take of its device: what is free, and what its own allocator holds without use."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.memory.device_memory import Room, TorchMemory


def device_memory(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> tuple[TorchMemory, list[str]]:
    """That of an accelerator whose functions answer so; which were called."""
    called: list[str] = []

    def function(name: str, answer: Any) -> Any:
        def asked() -> Any:
            called.append(name)
            return answer

        return asked

    module = SimpleNamespace(**{name: function(name, answer) for name, answer in answers.items()})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return TorchMemory(torch.device("cuda")), called


def test_memory_that_the_allocator_holds_without_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, _ = device_memory(monkeypatch, mem_get_info=(10, 100), memory_allocated=30, memory_reserved=50)
    assert memory.room() == Room(free=30, most=100)


def test_a_process_that_may_take_a_share_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"mem_get_info": (60, 100), "memory_allocated": 30, "memory_reserved": 30}
    memory, _ = device_memory(monkeypatch, **answers, get_per_process_memory_fraction=0.4)
    assert memory.room() == Room(free=10, most=40)


def test_devices_that_do_not_tell_are_asked_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "collect", lambda: None)  # slow among all that tests have imported
    assert TorchMemory(torch.device("cpu")).room() is None
    memory, called = device_memory(monkeypatch, empty_cache=None)
    assert memory.room() is None
    memory.give_back()
    assert called == ["empty_cache"]
    TorchMemory(torch.device("cpu")).give_back()
