"""The part for two cards of the first look, as far as CPUs go: by gloo, the other rank forked instead of started."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.first_look.part import Setting
from benchmarks.first_look.parts import two_cards
from benchmarks.first_look.parts.two_cards.rank_0 import made
from benchmarks.first_look.parts.two_cards.rank_1 import serve
from tests.support.ranks import RankBeside

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

SMALL = Setting(torch.device("cpu"), is_small=True)


def lines(way: str, kill: bool = False) -> list[dict[str, Any]]:
    return list(made(SMALL, way, kill, lambda place: RankBeside(serve, place, SMALL)))


@pytest.mark.rest
def test_a_killed_rank_is_noticed_and_the_next_group_makes_the_same_bytes() -> None:
    told, ended = lines("ulysses", kill=True)
    assert told["by_ranks"]
    assert told["deviation"] <= two_cards.MOST
    assert told["same_bytes"]
    assert ended["ended"].startswith("noticed in forward ")
    [again] = lines("ulysses")
    assert again["digest"] == told["digest"]


@pytest.mark.rest
def test_two_samples_are_made_on_two_ranks() -> None:
    [told] = lines("batch")
    assert told["by_ranks"]
    assert told["deviation"] <= two_cards.MOST


def test_one_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = two_cards.look(Setting(torch.device("cuda"), is_small=False))
    assert found.wrong == "it needs 2 cards, and torch sees 1 here"
