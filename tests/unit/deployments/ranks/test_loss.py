"""Who has given up while others wait, and what the next group is told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments import lacks as lacks_module
from deployments.lacks import LacksOfDeployment
from deployments.ranks.loss.lack import DEATHS, REFUSED_S, Lack, Refusals, lack_of, with_another
from deployments.ranks.loss.left_alone import ANY_FORWARD, PATIENCE_S, Failure, LeftAlone
from tests.support.played_store import PlayedStore

FULL = Failure(7, "OutOfMemoryError", lacks_memory=True)
EARLIER = Failure(6, "OutOfMemoryError", lacks_memory=True)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("failures", "ranks_of_sample", "alone"),
    [
        ({1: FULL}, 2, [1]),
        ({0: FULL}, 2, [0]),
        ({1: Failure(ANY_FORWARD, "", True)}, 2, [1]),
        ({0: FULL, 1: FULL}, 2, []),
        ({1: FULL, 2: FULL, 3: FULL}, 4, [1, 2, 3]),
        ({2: FULL, 3: FULL}, 2, []),
        ({1: EARLIER}, 2, []),
        ({1: FULL}, 1, []),
        ({1: Failure(7, "AssertionError", lacks_memory=False)}, 2, []),
        ({0: FULL, 1: Failure(7, "RuntimeError", lacks_memory=False)}, 2, []),
        ({}, 2, []),
    ],
)
def test_ranks_that_failed_alone_are_seen_when_the_others_had_time_to_fail_too(
    failures: dict[int, Failure], ranks_of_sample: int, alone: list[int]
) -> None:
    clock = Clock()
    seen = LeftAlone(clock)
    assert seen.look(7, failures, ranks_of_sample) == []
    clock.now = PATIENCE_S
    assert seen.look(7, failures, ranks_of_sample) == alone
    assert seen.look(8, failures, ranks_of_sample) == [] or ANY_FORWARD in {f.forward for f in failures.values()}


def test_each_death_is_counted_and_the_smallest_batch_kept() -> None:
    first = with_another((), Lack("a", "16x4", 8))
    other = with_another(first, Lack("b", "16x4", 2))
    assert with_another(other, Lack("a", "16x4", 5)) == (Lack("b", "16x4", 2), Lack("a", "16x4", 5, deaths=2))
    assert with_another(other, Lack("a", "32x4", 9))[-1] == Lack("a", "32x4", 9)


def test_what_ended_groups_again_and_again_is_refused_for_a_while() -> None:
    clock = Clock()
    arguments = {"hidden_states": torch.zeros(4, 16, 4)}
    assert lack_of("a", arguments, None) == Lack("a", "16x4", 4)
    known = [Lack("a", "16x4", 3, DEATHS, clock()), Lack("b", "16x4", 1, DEATHS - 1, clock())]
    refusals = Refusals(known, clock)
    assert "2 groups of ranks ended by 3 samples of 16x4 in a" in str(refusals.reason("a", arguments, None))
    assert refusals.reason("a", {"hidden_states": torch.zeros(2, 16, 4)}, None) is None
    assert refusals.reason("a", {"hidden_states": torch.zeros(4, 32, 4)}, None) is None
    assert refusals.reason("b", arguments, None) is None
    clock.now = REFUSED_S
    assert refusals.reason("a", arguments, None) is None


def test_a_deployment_keeps_what_it_lacked_memory_for_until_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = PlayedStore()
    monkeypatch.setattr(lacks_module, "internal_kv", store)
    clock = Clock()
    first, second = (LacksOfDeployment("app", "Denoiser", "1", clock) for _ in range(2))  # of two replicas
    first.add(Lack("a", "16x4", 3, noted_at=0.0))
    clock.now = REFUSED_S / 2
    second.add(Lack("b", "16x4", 1, noted_at=clock()))
    assert first.known() == (Lack("a", "16x4", 3), Lack("b", "16x4", 1))
    for other in (("app", "Other", "1"), ("app", "Denoiser", "2")):
        assert LacksOfDeployment(*other, clock).known() == ()
    clock.now = REFUSED_S
    assert first.known() == (Lack("b", "16x4", 1),), "each is kept for its own time"
    first.add(Lack("b", "16x4", 2, noted_at=clock()))
    assert second.known() == (Lack("b", "16x4", 1, deaths=2),)


def test_a_store_that_is_away_stops_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lacks_module, "internal_kv", None)
    LacksOfDeployment("app", "Denoiser", "1").add(Lack("a", "16x4", 3))
    assert LacksOfDeployment("app", "Denoiser", "1").known() == ()


def test_what_another_release_has_left_stops_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = PlayedStore()
    monkeypatch.setattr(lacks_module, "internal_kv", store)
    for text in ('[{"unknown": 1}]', '{"at": 1}', "no JSON"):
        store._internal_kv_put("app/Denoiser/1", text, namespace=lacks_module.NAMESPACE)
        assert LacksOfDeployment("app", "Denoiser", "1").known() == ()
