"""A request rewires modules of its own; the shared ones have it around its forwards only."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.stage_pipeline.sessions.own_modules import OwnModules, rewired


class Attention(torch.nn.Module):
    """A part whose processor pipelines exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = "its own"
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (2 if self.processor == "twice" else 1)


def model() -> Any:
    return torch.nn.Sequential(Attention(), Attention())


def exchange_the_processor(own: Any) -> None:
    own[0].processor = "twice"


def add_a_hook(own: Any) -> None:
    own[1].register_forward_hook(lambda _, arguments, output: output * 2)


def exchange_a_child(own: Any) -> None:
    own[1].linear = torch.nn.Identity()


def set_a_switch(own: Any) -> None:
    own[0].processor = own[1].processor = "twice"
    del own[0].processor


REWIRE = [exchange_the_processor, add_a_hook, exchange_a_child]
X = torch.ones(1, 2)


@pytest.mark.parametrize("rewire", REWIRE)
@torch.no_grad()
def test_what_a_request_rewires_works_around_its_forwards_and_nowhere_else(rewire: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    shared, rewired_itself = model(), model()
    rewired_itself.load_state_dict(shared.state_dict())
    rewire(rewired_itself)
    plain, truth = shared(X), rewired_itself(X)
    assert not torch.equal(plain, truth)
    own = OwnModules(shared, in_parts=True)
    rewire(own.of(shared))
    assert torch.equal(shared(X), plain)
    for _ in range(2):
        with rewired(own, own.changes()):
            assert torch.equal(shared(X), truth)
        assert torch.equal(shared(X), plain)
    assert OwnModules(shared, in_parts=True).of(shared)[0].processor == "its own"  # type: ignore[index]


def test_own_modules_share_the_weights_and_are_the_same_from_wherever_they_are_reached() -> None:
    shared = model()
    own = OwnModules(shared, in_parts=True)
    part = own.of(shared[1])
    assert part is own.of(shared)[1]  # type: ignore[index]
    assert isinstance(part, Attention)
    assert part is not shared[1]
    assert [p is q for p, q in zip(own.of(shared).parameters(), shared.parameters(), strict=True)] == [True] * 4
    assert own.changes() == []


def test_what_is_set_back_is_no_change() -> None:
    shared = model()
    own = OwnModules(shared, in_parts=True)
    mine: Any = own.of(shared)
    mine[0].processor = "twice"
    handle = mine[1].register_forward_hook(lambda *_: None)
    assert len(own.changes()) == 2
    mine[0].processor = "its own"
    handle.remove()
    assert own.changes() == []
    mine[0].scale = torch.ones(3)
    assert [change.name for change in own.changes()] == ["scale"]


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    shared = model()
    own = OwnModules(shared, in_parts=True)
    exchange_the_processor(own.of(shared))
    with pytest.raises(RuntimeError, match="no memory"), rewired(own, own.changes()):
        raise RuntimeError("no memory")
    assert shared[0].processor == "its own"


@torch.no_grad()
def test_what_a_forward_leaves_in_a_rewired_module_is_the_requests_own() -> None:
    shared = model()
    own = OwnModules(shared, in_parts=True)
    mine: Any = own.of(shared)

    def note_once(module: Any, arguments: Any, output: torch.Tensor) -> None:
        module.noted = output
        handle.remove()

    handle = mine[1].register_forward_hook(note_once)
    with rewired(own, own.changes()):
        shared(X)
    assert not hasattr(shared[1], "noted")
    assert not shared[1]._forward_hooks
    assert torch.equal(mine[1].noted, shared(X))
    assert [change.name for change in own.changes()] == ["noted"]


def test_another_request_that_begins_during_a_forward_finds_the_modules_as_they_were() -> None:
    shared = model()
    first = OwnModules(shared, in_parts=True)
    exchange_the_processor(first.of(shared))
    found: list[Any] = []
    with rewired(first, first.changes()):
        begun = threading.Thread(target=lambda: found.append(OwnModules(shared, in_parts=True).of(shared)))
        begun.start()
        begun.join()
    assert found[0][0].processor == "its own"
