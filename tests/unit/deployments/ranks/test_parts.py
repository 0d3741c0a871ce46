"""A denoiser of which each rank has a part of the weights: its ranks make the first forward of a kind too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.engine.executor import LocalExecutor
from deployments.errors import NotSupportedError
from deployments.ranks.args import ParallelArgs
from deployments.ranks.executor import RanksExecutor


class Doubling(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        if x.numel() == 0:
            raise ValueError("there is nothing")
        return x * 2


class Part:
    """Of a SplitModule."""

    holds_all = False

    def set_uneven(self, uneven: bool) -> None: ...

    def whole(self) -> Any:
        raise NotSupportedError("it has a part")


@contextmanager
def forward(number: int, lack: Any) -> Iterator[None]:
    yield


def executor_of(module: torch.nn.Module, is_changed: bool = False) -> RanksExecutor:
    """As rank 0, which sends to nobody here."""
    met = SimpleNamespace(splits={"toy": Part()})
    group: Any = SimpleNamespace(
        args=ParallelArgs(tensor=2), others=[], met=met, lacks=(), check=lambda: None, forward=forward
    )
    return RanksExecutor(group, LocalExecutor(), {"toy": module}, is_changed=lambda module: is_changed)


@torch.no_grad()
def run(executor: RanksExecutor, module: torch.nn.Module, length: int = 2) -> Any:
    return executor.run("toy", module, None, {"x": torch.ones(length)})


def test_the_first_forward_is_made_by_the_ranks_alone_and_not_held_against_another() -> None:
    module = Doubling()
    executor = executor_of(module)
    assert run(executor, module).tolist() == [2, 2]
    assert run(executor, module).tolist() == [2, 2]
    assert module.num_forwards == 2


def test_what_the_forward_raises_is_told_as_it_is() -> None:
    module = Doubling()
    with pytest.raises(ValueError, match="there is nothing"):
        run(executor_of(module), module, length=0)


def test_what_needs_all_weights_is_refused() -> None:
    module = Doubling()
    with pytest.raises(NotSupportedError):
        run(executor_of(module, is_changed=True), module)
