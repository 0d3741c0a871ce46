"""How the accelerators of one pool are shared by all deployments of all models.

Each model gets the same share of what it needs, times its priority, and none gets more than it needs. A model that has
work gets at least one replica of each of its deployments. Where not even these fit, models take turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

ROUND = 1e-9


@dataclass(frozen=True)
class Demand:
    """What one deployment asks of the pool. Replicas are counted whole, but for those in `now` and `fair`."""

    model: str  # "" where there is one alone
    now: float  # replicas that its work needs at this moment; 0 without work
    fair: float  # the mean of it over the time that moving replicas takes: what a full pool is shared by
    held: int  # what it may keep where there is room: the most that was needed in its cooldown
    least: int  # its min_replicas
    have: int  # replicas that it has, those that still start among them
    is_firm: bool = False  # it got one just now: none is taken from it while it has work
    accelerators: float = 1.0  # of one replica; 0: it takes nothing of the pool
    priority: float = 1.0


@dataclass(frozen=True)
class Turn:
    """Whether a model has a place in the pool, and since when (seconds): of interest where not all have one."""

    given: bool
    since_s: float
    length_s: float  # how long it keeps its place while others wait
    runs: bool = True  # else it loads, and may still find no room


def fits(pool: float, demands: Sequence[Demand], replicas: Sequence[float]) -> bool:
    """Whether so many replicas of each deployment find their accelerators."""
    taken = sum(each.accelerators * count for each, count in zip(demands, replicas, strict=True))
    return taken <= pool + ROUND


def share(pool: float, demands: Sequence[Demand], given: set[str]) -> list[int]:
    """Replicas of each deployment: what it may keep if all fit, else what is fair. Models not `given` get the least."""
    if fits(pool, demands, [each.held for each in demands]):
        return [each.held for each in demands]
    asked = [each if each.model in given else replace(each, now=0.0, fair=0.0, held=each.least) for each in demands]
    floors = least_sets(asked)
    firm = [
        max(low, each.have) if each.is_firm and each.now > 0 else low for each, low in zip(asked, floors, strict=True)
    ]
    if fits(pool, demands, firm):
        floors = firm
    needed = [max(floor, math.ceil(each.fair - ROUND)) for each, floor in zip(asked, floors, strict=True)]
    replicas = fill(pool, asked, floors, needed)
    held = [max(count, each.held) for each, count in zip(asked, replicas, strict=True)]
    return fill(pool, asked, replicas, held)


def least_sets(demands: Sequence[Demand]) -> list[int]:
    """One replica where there is work, and no less than min_replicas."""
    return [max(each.least, 1 if each.now > 0 else 0) for each in demands]


def fill(pool: float, demands: Sequence[Demand], floors: Sequence[int], tops: Sequence[int]) -> list[int]:
    """From `floors` towards `tops`, all at one level: the level is replicas for each that is needed, over priority.

    The last places, too few for one more of each, go to replicas that run already before others, so that needs which
    waver by less than a replica start and stop none.
    """

    def at(level: float) -> list[int]:
        pulled = [math.floor(level * each.priority * max(each.fair, ROUND) + ROUND) for each in demands]
        return [max(low, min(high, count)) for low, high, count in zip(floors, tops, pulled, strict=True)]

    free = [high if each.accelerators == 0 else low for each, low, high in zip(demands, floors, tops, strict=True)]
    if fits(pool, demands, tops):
        return list(tops)
    if not fits(pool, demands, floors):
        return free
    low, high = 0.0, 1.0
    while fits(pool, demands, at(high)) and high < 1e12:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(pool, demands, at(middle)) else (low, middle)
    replicas = [max(count, own) for count, own in zip(at(low), free, strict=True)]
    return with_last_places(pool, demands, replicas, tops)


def with_last_places(pool: float, demands: Sequence[Demand], replicas: Sequence[int], tops: Sequence[int]) -> list[int]:
    counts = list(replicas)

    def order(index: int) -> tuple[bool, float]:
        each = demands[index]
        return counts[index] >= each.have, (counts[index] + 1) / (each.priority * max(each.fair, ROUND))

    for index in sorted(range(len(counts)), key=order):
        more = [count + (number == index) for number, count in enumerate(counts)]
        if counts[index] < tops[index] and fits(pool, demands, more):
            counts = more
    return counts


def take_turns(pool: float, demands: Sequence[Demand], turns: dict[str, Turn], now_s: float) -> set[str]:
    """The models that get a place: all that have work, if one replica of each of their deployments fits.

    Else those whose turn is not over keep theirs. Then come those that wait, the longest first, and the first of
    these for which there is no room lets none overtake it. What is left stays with those that have it. A priority
    makes a turn longer and a wait count for more.
    """
    working = {each.model for each in demands if each.now > 0}
    idle = {each.model for each in demands} - working
    sets = least_sets(demands)
    if fits(pool, demands, sets):
        return working | idle
    priority = {each.model: each.priority for each in demands}

    def is_over(model: str) -> bool:
        turn = turns[model]
        return now_s - turn.since_s >= turn.length_s * priority[model]

    def rank(model: str) -> tuple[bool, float, str]:
        return not turns[model].runs, turns[model].since_s, model

    holding = {model for model in working if turns[model].given}
    waited = {model: (now_s - turns[model].since_s) * priority[model] for model in working}
    kept = sorted((model for model in holding if not is_over(model)), key=rank)
    waiting = sorted(working - holding, key=lambda model: (-waited[model], model))
    over = sorted(holding - set(kept), key=lambda model: (-turns[model].since_s, model))
    chosen, blocked = set(idle), False
    for model in (*kept, *waiting, *over):
        with_it = chosen | {model}
        counts = [own if each.model in with_it else each.least for each, own in zip(demands, sets, strict=True)]
        if fits(pool, demands, counts) and not (blocked and model in waiting):
            chosen = with_it
        elif model in waiting:
            blocked = True
    return chosen
