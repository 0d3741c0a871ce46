"""Each family for which diffusers has a plan, its sequence split over ranks: close to one process, whatever lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deployments.engine.batching.closeness import is_same
from deployments.ranks.executor import RanksExecutor
from deployments.tensors.values import tensors
from tests.support.further import all_but
from tests.support.ranks import modules_on_ranks
from tests.support.split_modules import SPLIT_MODULES

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

DEVIATION = 2e-6  # of the largest value, in float32, after one forward
LENGTHS = {"even": (16, 8), "uneven": (15, 9), "of which one divides": (16, 7)}  # tokens of the picture, of the text
SHOWN = ["ltx2 even", "qwen_image uneven"]  # the others are `rest`
CASES = {f"{name} {lengths}": (name, lengths) for name in SPLIT_MODULES for lengths in LENGTHS}


@pytest.fixture(scope="module")
def by_two() -> Iterator[RanksExecutor]:
    with modules_on_ranks({name: each.build for name, each in SPLIT_MODULES.items()}, None, ulysses=2) as (_, executor):
        yield executor


@pytest.fixture(scope="module")
def by_four() -> Iterator[RanksExecutor]:
    with modules_on_ranks({name: each.build for name, each in SPLIT_MODULES.items()}, None, ulysses=4) as (_, executor):
        yield executor


@pytest.mark.parametrize("case", all_but(SHOWN, CASES))
def test_two_ranks_make_what_one_makes(case: str, by_two: RanksExecutor) -> None:
    check(*CASES[case], by_two)


@pytest.mark.rest
@pytest.mark.parametrize("case", CASES)
def test_four_ranks_make_what_one_makes(case: str, by_four: RanksExecutor) -> None:
    check(*CASES[case], by_four)


@torch.no_grad()
def check(name: str, lengths: str, executor: RanksExecutor) -> None:
    module = executor._modules[name]
    arguments = {**SPLIT_MODULES[name].arguments(*LENGTHS[lengths]), "return_dict": False}  # as pipelines have it
    before = by_rank_0(executor)
    first = executor.run(name, module, None, arguments)
    assert by_rank_0(executor) == before
    again = executor.run(name, module, None, arguments)
    assert is_same(again, executor.run(name, module, None, arguments))
    with executor._group.met.splits[name].whole():
        alone = module(**arguments)
    print(f"{name} {lengths}: {apart(first, alone):.1e}")
    assert max(apart(first, alone), apart(again, alone)) <= DEVIATION


@pytest.mark.rest
@torch.no_grad()
def test_what_the_ranks_cannot_compute_rank_0_computes_alone(
    by_two: RanksExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers splits the arguments of a whole module for outputs that are tuples only."""
    module, arguments = by_two._modules["flux"], SPLIT_MODULES["flux"].arguments(*LENGTHS["even"])
    before = by_rank_0(by_two)
    outputs = [by_two.run("flux", module, None, arguments) for _ in range(2)]
    with by_two._group.met.splits["flux"].whole():
        assert all(is_same(output, module(**arguments)) for output in outputs)
    assert by_rank_0(by_two) == before + 1
    assert "rank 0 computes alone with flux: ValueError: Expected output to be a tensor" in caplog.text
    assert by_two._group.lost is None


def by_rank_0(executor: RanksExecutor) -> int:
    """Kinds and structures of forwards that it makes alone."""
    return len(executor._not_by_ranks) + sum(way is None for way in executor._ways.values())


def apart(output: Any, alone: Any) -> float:
    pairs = zip(tensors(output), tensors(alone), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
