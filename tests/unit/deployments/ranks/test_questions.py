"""Questions to other ranks and their answers stay together, whatever fails between them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.executor import LocalExecutor
from deployments.errors import ReplicaUnfitError
from deployments.ranks.channel import message_of
from deployments.ranks.executor import IN_VAIN, RanksExecutor
from deployments.ranks.loss.alone_log import AloneLog
from deployments.ranks.loss.connection import is_of_connection
from deployments.ranks.loss.lack import DEATHS, Refusals, lack_of
from deployments.ranks.loss.questions import Questions
from deployments.ranks.tiles.calls import Call
from deployments.ranks.tiles.spread import SpreadTiles
from deployments.tensors.out_of_memory import KnownNotToFitError
from tests.support.played_ranks import played_group

CPU = torch.device("cpu")
TOY_AXES = BatchAxes({("x",): 0}, {(): 0})
RAISED = [RuntimeError("gone"), MemoryError(), KeyError("tree"), ValueError("no JSON"), KeyboardInterrupt()]


def raised_or_empty(error: BaseException | None) -> Any:
    if error is not None:
        raise error
    return {}


@pytest.mark.parametrize("error", RAISED, ids=repr)
@pytest.mark.parametrize("between", [True, False], ids=["before the answers", "while they are read"])
def test_what_is_raised_before_the_last_answer_ends_the_group(error: BaseException, between: bool) -> None:
    with played_group(lambda rank, asked: raised_or_empty(None if between else error), batch=3) as (group, _):
        questions = Questions(group)
        message = message_of({"number": questions.next_number()})
        with suppress(BaseException), questions.asked({1: message, 2: message}) as answers:
            if between:
                raise error
            answers()
        assert group.lost is not None


def test_an_answer_to_another_question_ends_the_group() -> None:
    with played_group(lambda rank, asked: {"number": asked["number"] - 1}, batch=2) as (group, _):
        questions = Questions(group)
        message = message_of({"number": questions.next_number()})
        with suppress(ReplicaUnfitError), questions.asked({1: message}) as answers:
            answers()
        assert group.lost == "rank 1 is not in step: it answers question 0, not 1"


class Full:
    """Of a device: it has no room for what a rank has answered."""

    def to(self, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")


@torch.no_grad()
def test_tiles_that_find_no_room_here_leave_no_answer_behind() -> None:
    is_full = True

    def answer(rank: int, asked: Any) -> Any:
        chains = asked["arguments"]["chains"]
        made = [[[chain[0]["args"][0] * 2]] for chain in chains]
        return {"error": None, "output": [[[Full()]]] if is_full and rank == 1 else made}

    with played_group(answer, batch=3) as (group, channel):
        tiles = SpreadTiles(group, CPU)
        for value in (1.0, 2.0):
            chains = [(Call((torch.full((2,), value),), {}, wanted=(0,)),) for _ in range(3)]
            if is_full:
                with pytest.raises(torch.OutOfMemoryError):
                    tiles._made("vae", lambda x: x * 2, chains)
                is_full = False
                assert not any(channel.unread.values())
            else:
                assert [made[0][0].tolist() for made in tiles._made("vae", lambda x: x * 2, chains)] == [[4, 4]] * 3
        assert group.lost is None


def doubled(rank: int, asked: Any) -> Any:
    x = asked["arguments"]["x"]
    if x.shape[1] > 2:
        return {"error": "ValueError: of no use", "lacks_memory": False}
    return {"error": None, "output": x * 2}


def executor_on(group: Any) -> RanksExecutor:
    toy = torch.nn.Identity()
    toy.forward = lambda x: x * 2  # type: ignore[method-assign, assignment]
    return RanksExecutor(group, LocalExecutor(), {"toy": toy}, lambda component: TOY_AXES)


@torch.no_grad()
def run(executor: RanksExecutor, length: int, module: Any = None) -> Any:
    return executor.run("toy", module or executor._modules["toy"], None, {"x": torch.ones(2, length)})


def test_a_group_that_fails_at_one_size_after_another_ends() -> None:
    with played_group(doubled, batch=2) as (group, _):
        executor = executor_on(group)
        assert run(executor, 2).tolist() == [[2, 2], [2, 2]]
        for length in range(3, 3 + IN_VAIN):
            assert group.lost is None
            assert run(executor, length).sum() == 4 * length
        assert "3 sizes one after another" in str(group.lost)


def test_a_forward_that_rank_0_makes_alone_is_not_refused_for_what_another_lacked() -> None:
    with played_group(doubled, batch=2) as (group, _):
        executor = executor_on(group)
        lack = replace(lack_of("toy", {"x": torch.ones(2, 1)}, TOY_AXES), deaths=DEATHS)
        executor._refusals = Refusals([lack], lambda: 0.0)
        other = torch.nn.Identity()
        other.forward = lambda x: x * 3  # type: ignore[method-assign, assignment]
        assert run(executor, 1, other).tolist() == [[3], [3]]
        with pytest.raises(KnownNotToFitError):
            run(executor, 1)


@pytest.mark.parametrize(
    ("reason", "is_one"),
    [
        ("DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94", True),
        ("DistNetworkError: the client socket has timed out", True),
        ("RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", True),
        ("RuntimeError: [../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv", True),
        ("RuntimeError: The size of tensor a (3) must match the size of tensor b (2)", False),
        ("ValueError: tensor's first dimension must be divisible by mesh size", False),
        ("RuntimeError: ProcessGroupGloo::allgather: invalid tensor size at index 1", False),
    ],
)
def test_an_error_of_the_connection_is_no_matter_of_sizes(reason: str, is_one: bool) -> None:
    assert is_of_connection(reason) == is_one


def test_ranks_that_all_lose_each_other_end_the_group() -> None:
    with played_group(doubled, ulysses=2) as (group, _):
        error = RuntimeError("gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        answers = {1: {"error": f"RuntimeError: {error}", "lacks_memory": False}}
        with pytest.raises(ReplicaUnfitError, match="the ranks do not reach each other: rank 0"):
            executor_on(group)._check_answers(answers, error)


def test_the_log_says_each_reason_once_whatever_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    log = AloneLog("parallel")
    for reason in ("it deviates by 1.5e-3", "it deviates by 2.5e-3", "its sizes"):
        log.tell("flux", reason)
    log.tell("wan", "its sizes")
    assert [record.getMessage() for record in caplog.records] == [
        "parallel: rank 0 computes alone with flux: it deviates by 1.5e-3",
        "parallel: rank 0 computes alone with flux: its sizes",
        "parallel: rank 0 computes alone with wan: its sizes",
    ]
