"""LoRAs that another rank lacks: for a while its forwards are rank 0's, and no other's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from deployments.adapters.use import AdapterUse
from deployments.ranks.adapters import COMING_S, FAILED_S, Absent, HeldByOthers
from deployments.ranks.portions import NoPortionsError
from deployments.stages.ranks.adapters import AdaptersOfRank

INK, OIL = AdapterUse("ink", "/ink"), AdapterUse("oil", "/oil")
USES = {"i": INK, "o": OIL}
INK_NAMES, OIL_NAMES = frozenset({"i"}), frozenset({"o"})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("absent", "until_s", "reason"),
    [
        (Absent(failed={"i": "it is gone"}), FAILED_S, "rank 2 cannot use its LoRAs: it is gone"),
        (Absent(coming=("i",)), COMING_S, "rank 2 is still fetching its LoRAs"),
    ],
)
def test_one_that_a_rank_lacks_is_asked_for_again_later_and_others_are_held(
    absent: Absent, until_s: float, reason: str
) -> None:
    clock = Clock()
    held = HeldByOthers(clock)
    asked = held.to_ask(INK_NAMES, USES)
    assert asked == USES
    with pytest.raises(NoPortionsError, match=reason):
        held.note(INK_NAMES, asked, {1: Absent().plain(), 2: absent.plain()})
    assert held.has(OIL_NAMES)
    with pytest.raises(NoPortionsError, match=reason):
        held.to_ask(INK_NAMES, USES)
    assert ("i" in held.to_ask(OIL_NAMES, USES)) == (not absent.failed)
    clock.now = until_s
    assert held.to_ask(INK_NAMES, USES) == USES
    held.note(INK_NAMES, USES, {1: Absent().plain(), 2: Absent().plain()})
    assert held.has(INK_NAMES | OIL_NAMES)


class Slow:
    """An Adapters whose first LoRA comes late, and of which oil cannot be had."""

    def __init__(self) -> None:
        self.there = threading.Event()
        self.held: list[str] = []

    def fetched(self, use: AdapterUse) -> Any:
        if use.name == "oil":
            raise FileNotFoundError("no oil")
        self.there.wait(60)
        return use

    @contextmanager
    def holding(self, uses: Sequence[AdapterUse]) -> Iterator[Any]:
        assert self.there.is_set()
        self.held += [use.name for use in uses]
        yield uses
        self.held = []


def test_a_rank_that_is_still_fetching_says_so_and_has_it_when_it_is_there() -> None:
    library = Slow()
    rank = AdaptersOfRank(library, (), patience_s=0.01)
    absent = rank.hold(USES)
    assert absent == Absent(("i",), {"o": "FileNotFoundError: no oil"})
    library.there.set()
    fetching = rank._fetching[INK]
    fetching.result()
    assert rank.hold({"i": INK}) == Absent()
    assert library.held == ["ink"]
    rank.hold({})
    assert library.held == []
