"""A rank that dies, stops, hangs or raises: the group ends as one within a bound, or stays in step."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deployments.errors import ReplicaUnfitError
from deployments.modules import AccelerationError
from deployments.ranks.args import ParallelArgs
from deployments.ranks.executor import RanksExecutor
from deployments.ranks.group import RankGroup
from tests.support.further import further
from tests.support.ranks import RankBeside, toy_on_ranks

pytestmark = pytest.mark.filterwarnings("default")  # torch.distributed warns of its own affairs

SILENCE_S = 2.0
COLLECTIVE_S = 2.0
GIVE_UP_S = 60.0


class Toy(torch.nn.Module):
    """Does with its samples what the largest number among them says."""

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        largest = float(x.max())
        if largest == FAILS:
            raise ValueError("a sample is 13")
        if largest == LACKS_MEMORY:
            raise torch.OutOfMemoryError("out of memory")
        if largest == HANGS:
            time.sleep(GIVE_UP_S)
        return x * 2


FAILS, LACKS_MEMORY, HANGS = 13.0, 14.0, 15.0


@pytest.fixture
def toy() -> Iterator[tuple[RankGroup, RanksExecutor]]:
    settings = {"silence_timeout_s": SILENCE_S, "collective_timeout_s": COLLECTIVE_S}
    with toy_on_ranks(Toy, batch=2, **settings) as opened:
        yield opened


def run(executor: RanksExecutor, *samples: float) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = executor.run(
            "toy", executor._modules["toy"], None, {"x": torch.tensor(samples, dtype=torch.float32)}
        )
    return output


def run_for_ever(executor: RanksExecutor) -> None:
    while True:
        run(executor, 1, 2)


def process_of(group: RankGroup) -> int:
    rank: Any = group.processes[1]
    return int(rank.process.pid)


def wait_until_lost(group: RankGroup) -> str:
    give_up = time.monotonic() + GIVE_UP_S
    while group.lost is None:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return group.lost


def test_what_a_rank_raises_is_raised_here_and_the_group_stays_in_step(toy: tuple[RankGroup, RanksExecutor]) -> None:
    group, executor = toy
    assert run(executor, 1, 2).tolist() == [2, 4]
    with pytest.raises(ValueError, match="a sample is 13"):  # rank 0 has made it again, alone
        run(executor, 1, FAILS)
    with pytest.raises(torch.OutOfMemoryError, match="rank 1"):
        run(executor, 1, LACKS_MEMORY)
    with pytest.raises(ValueError, match="a sample is 13"):
        run(executor, FAILS, 1)
    assert run(executor, 1, 2, 3).tolist() == [2, 4, 6]
    assert group.lost is None


def ended(group: RankGroup) -> str:
    os.kill(process_of(group), signal.SIGKILL)
    return "has ended: exit code -9|cannot be reached"


def stopped(group: RankGroup) -> str:
    os.kill(process_of(group), signal.SIGSTOP)
    return "has not been heard of for|cannot be reached"


@pytest.mark.parametrize("harm", [ended, further(stopped)])
def test_a_rank_that_is_gone_ends_the_group_whether_it_works_or_not(
    harm: Any, toy: tuple[RankGroup, RanksExecutor]
) -> None:
    group, executor = toy
    assert run(executor, 1, 2).tolist() == [2, 4]
    expected = harm(group)
    with pytest.raises(ReplicaUnfitError):
        run_for_ever(executor)
    assert re.search(expected, wait_until_lost(group))
    with pytest.raises(ReplicaUnfitError):
        run(executor, 1, 2)
    rank: Any = group.processes[1]
    rank.process.join(GIVE_UP_S)
    assert not rank.process.is_alive(), "it was ended with the group"


@pytest.mark.rest
def test_a_stopped_rank_is_noticed_while_nothing_is_asked(toy: tuple[RankGroup, RanksExecutor]) -> None:
    group, _ = toy
    stopped(group)
    assert "rank 1 has not been heard of for" in wait_until_lost(group)


@pytest.mark.rest
def test_a_forward_that_hangs_on_one_rank_ends_the_group_in_time(toy: tuple[RankGroup, RanksExecutor]) -> None:
    group, executor = toy
    assert run(executor, 1, 2).tolist() == [2, 4]
    with pytest.raises(ReplicaUnfitError, match=r"rank 1 cannot be reached: .*[Tt]imed out"):
        run(executor, 1, HANGS)
    assert group.lost is not None


def leave(place: Any) -> None:
    """A rank that ends before it has loaded anything."""


@pytest.mark.rest
def test_a_rank_that_cannot_start_is_told_by_name() -> None:
    group = RankGroup(ParallelArgs(batch=2), lambda place: RankBeside(leave, place))
    with pytest.raises(AccelerationError, match="rank 1 has ended: exit code 0"):
        group.open({"toy": Toy()}, torch.device("cpu"))
