"""Components come to the device by turns, and go back without a copy: shown with `meta`, which gives nothing back."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from deployments.memory.host_weights import HostWeights
from deployments.memory.turns import Turns

META, CPU = torch.device("meta"), torch.device("cpu")


class Tied(torch.nn.Module):
    """Two names for one weight, a buffer, and a method that pipelines call."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x) * self.scale
        return logits

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self(x) + self.scale
        return encoded


def devices(module: torch.nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*module.parameters(), *module.buffers()]}


def test_weights_come_and_go_as_the_same_objects_with_the_same_numbers() -> None:
    module = Tied()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    objects = list(module.parameters())
    weights = HostWeights(module)
    for _ in range(2):
        weights.to(META)
        assert devices(module) == {"meta"}
        assert module.head.weight is module.words.weight
        weights.back()
        assert devices(module) == {"cpu"}
    assert all(a is b for a, b in zip(module.parameters(), objects, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_what_is_changed_on_the_device_stays_changed() -> None:
    module = Tied()
    weights = HostWeights(module)
    weights.to(CPU)
    with torch.no_grad():
        module.scale.add_(1)
        module.to(torch.bfloat16)
    weights.back()
    weights.to(CPU)
    assert (module.scale.item(), module.head.weight.dtype) == (3.0, torch.bfloat16)


def test_a_half_on_the_meta_device_stays_there() -> None:
    module = Tied()
    module.head = torch.nn.Linear(3, 4, device="meta")
    weights = HostWeights(module)
    weights.to(CPU)
    weights.back()
    assert devices(module) == {"cpu", "meta"}


def test_one_component_is_on_the_device_at_a_time_and_stays_for_its_next_call() -> None:
    turns, first, second = Turns(META), Tied(), Tied()
    turns.add("first", first)
    turns.add("second", second)
    given = torch.empty(1, 3, device="meta")
    for module in (first, first, second, first):
        module(given)
        others = second if module is first else first
        assert (devices(module), devices(others)) == ({"meta"}, {"cpu"})
    assert turns.moves == ["first", "second", "first"]


def test_whatever_a_pipeline_calls_of_it_brings_it_and_rest_takes_it_back() -> None:
    turns, module = Turns(META), Tied()
    turns.add("it", module)
    given = torch.empty(1, 3, device="meta")
    calls: list[Any] = [
        lambda: module(given),
        lambda: module.encode(given),
        lambda: module.head(given),
        lambda: module.words(torch.zeros(1, dtype=torch.int64, device="meta")),
    ]
    for call in calls:
        assert call().device == META
        turns.rest()
        assert (turns.present, devices(module)) == (None, {"cpu"})


def test_rest_leaves_what_another_thread_called_last() -> None:
    turns, module = Turns(META), Tied()
    turns.add("it", module)
    with turns.visit("it"):
        turns.rest()
        assert turns.present == "it"  # it is in a call
    elsewhere = threading.Thread(target=turns.rest)
    elsewhere.start()
    elsewhere.join()
    assert turns.present == "it"
    turns.rest()
    assert turns.present is None


def test_calls_of_two_components_in_two_threads_wait_for_each_other() -> None:
    turns = Turns(META)
    turns.add("a", Tied())
    turns.add("b", Tied())
    seen: list[str | None] = []

    def work(name: str) -> None:
        for _ in range(50):
            with turns.visit(name):
                seen.append(turns.present == name or None)  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 100
    assert all(seen)


def test_a_component_that_does_not_fit_is_on_the_host_again_and_is_tried_again() -> None:
    turns, module = Turns(META), Tied()
    turns.add("it", module)
    weights = turns._weights["it"]
    full = weights._weights[-1]
    come = full.come

    def refuse(device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    full.come = refuse  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        module(torch.empty(1, 3, device="meta"))
    assert (turns.present, devices(module)) == (None, {"cpu"})
    full.come = come  # type: ignore[method-assign]
    module(torch.empty(1, 3, device="meta"))
    assert devices(module) == {"meta"}
