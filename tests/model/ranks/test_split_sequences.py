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
    first = executor.run(name, module, None, arguments)
    assert [kind[0][0] for kind, way in executor._ways.items() if way is None] == [], "rank 0 made it alone"
    assert not executor._not_by_ranks
    again = executor.run(name, module, None, arguments)
    assert is_same(again, executor.run(name, module, None, arguments))
    with executor._group.met.splits[name].whole():
        alone = module(**arguments)
    print(f"{name} {lengths}: {apart(first, alone):.1e}")
    assert max(apart(first, alone), apart(again, alone)) <= DEVIATION


def apart(output: Any, alone: Any) -> float:
    pairs = zip(tensors(output), tensors(alone), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
