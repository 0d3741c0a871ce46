"""By which ways the denoisers of a plan can be split over cards, and what each way helps. Knows no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from deployments.plan.budget import Choice, Demand, Levers, demands_of, usable
from deployments.plan.cards import Card
from deployments.plan.measured import PLAIN, Component, Measured

DEGREES = (2, 4, 8)  # numbers of ranks that are tried
# The ways that are proposed, the one that costs least first: what each splits, and what it leaves whole on each card.
HELPS = {
    "ulysses": "the activations of its sequence; its weights are whole on each",
    "tensor": "its weights; the activations of its sequence are whole on each",
}


@dataclass(frozen=True)
class RankRow:
    """The denoiser alone on each card: bytes of one rank, for one sample."""

    way: str
    num_ranks: int
    weights: int
    activations: int
    needed: int
    fits: bool


@dataclass(frozen=True)
class Spread:
    """Over which cards the processes lie: see Choice."""

    apart: bool
    parallel: Mapping[str, int]


def spreads(measured: Measured, num_cards: int, wished: Mapping[str, int] | None) -> Iterator[Spread]:
    """From few cards to many; without ranks before with them."""
    ways = proposed(measured) if wished is None else [wished]
    for parallel in ways:
        size = prod(parallel.values())
        for apart in (False, True):
            if size + apart <= num_cards:
                yield Spread(apart, parallel)


def proposed(measured: Measured) -> list[Mapping[str, int]]:
    """One card for the denoiser, then the ways that its models have."""
    return [{}, *({way: degree} for degree in DEGREES for way in HELPS if not missing(measured, way, degree))]


def are_possible(measured: Measured, parallel: Mapping[str, int], levers: Levers) -> bool:
    """Beside these levers: weights that wait on the host are not had with ranks, packed ones cannot be split."""
    denoisers = denoisers_of(measured)
    packed = [each for each in denoisers if each.is_quantised or levers.precision.get(each.name, "bf16") not in PLAIN]
    waiting = [each for each in denoisers if each.name in levers.offloaded]
    return not parallel or not (waiting or (packed and "tensor" in parallel))


def parallel_problem(measured: Measured, parallel: Mapping[str, int]) -> str | None:
    """Why the model cannot be split so, with what it has; None: it can."""
    for way, degree in parallel.items():
        if way != "batch" and (names := missing(measured, way, degree)):
            have = ", ".join(f"{each}: {degrees_of(measured, each)}" for each in HELPS if degrees_of(measured, each))
            return (
                f"parallel {way}={degree} is not possible for {' and '.join(names)}. Of {', '.join(map(str, DEGREES))} "
                f"ranks can be had here: {have or 'none by these ways'}; batch: any number"
            )
    return None


def missing(measured: Measured, way: str, degree: int) -> list[str]:
    """The denoisers that so many ranks cannot split this way."""
    return [each.name for each in denoisers_of(measured) if degree not in each.ways.get(way, ())]


def degrees_of(measured: Measured, way: str) -> str:
    return " or ".join(str(degree) for degree in DEGREES if not missing(measured, way, degree))


def denoisers_of(measured: Measured) -> list[Component]:
    return [each for each in measured.components if each.is_denoiser]


def rank_rows(measured: Measured, card: Card) -> Iterator[RankRow]:
    """Each way that the model has, with weights as they are loaded, after one card alone; none where it has no way."""
    alone = rank_row(measured, card, "", 1)
    rows = [rank_row(measured, card, *each) for parallel in proposed(measured) for each in parallel.items()]
    if rows:
        yield alone
        yield from rows


def rank_row(measured: Measured, card: Card, way: str, degree: int) -> RankRow:
    choice = Choice("", parallel={way: degree} if way else {})
    demand: Demand = next(demands_of(measured, choice, "Denoiser", ("denoiser",)))
    fits = demand.total <= usable(card.num_bytes)
    return RankRow(way, degree, demand.weights, demand.activations, demand.total, fits)
