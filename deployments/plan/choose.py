"""Chooses for given cards what is served best, and says why: the first of all choices, in order, that fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from deployments.plan.budget import (
    KEPT_FREE,
    Choice,
    Demand,
    Levers,
    Processes,
    demands,
    needed,
    shares,
    usable,
)
from deployments.plan.cards import Card
from deployments.plan.measured import PLAIN, Measured, Scheme
from deployments.plan.ranks import HELPS, RankRow, Spread, are_possible, rank_rows, spreads

Placements = Mapping[str, Processes]  # in the order of preference
WORTH_THE_TROUBLE = 1_000_000_000  # bytes: a smaller encoder stays as it is
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
PICTURES_TOGETHER, VIDEOS_TOGETHER = (4, 2, 1), (1,)  # a video's forward fills a GPU by itself


@dataclass(frozen=True)
class Wishes:
    """What whoever asks has chosen already; None: to be chosen."""

    precision: Scheme | None = None  # of the denoisers
    placement: str | None = None
    max_batch_size: int | None = None
    parallel: Mapping[str, int] | None = None  # a way that the model has, on as many cards as there are, or fewer


@dataclass(frozen=True)
class Row:
    """A line of what fits where: bytes on the fullest card, at the largest batch."""

    placement: str
    levers: str
    needed: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """`choice` None: nothing fits, and `reasons` tell by how much."""

    card: Card
    num_cards: int
    choice: Choice | None
    demands: tuple[Demand, ...]
    num_gpus: Mapping[str, float]
    args: Mapping[str, Any]  # of the Serve config, beside the model and its dtype
    reasons: tuple[str, ...]
    rows: tuple[Row, ...]
    rank_rows: tuple[RankRow, ...] = ()


def choose(measured: Measured, card: Card, num_cards: int, placements: Placements, wishes: Wishes) -> Plan:
    """The best choice that fits on `num_cards` such cards."""
    kept = {n: p for n, p in placements.items() if wishes.placement in (None, n)}
    search = _Search(measured, card, num_cards, kept, wishes)
    chosen = next((choice for choice in search.choices() if search.fits(choice)), None)
    found = tuple(search.rows()), tuple(rank_rows(measured, card))
    if chosen is None:
        return Plan(card, num_cards, None, (), {}, {}, (search.why_nothing_fits(),), *found)
    demanded = search.demands(chosen)
    return Plan(
        card, num_cards, chosen, demanded, shares(demanded), arguments(chosen), tuple(search.why(chosen)), *found
    )


def ladder(measured: Measured, card: Card, wishes: Wishes) -> list[Levers]:
    """From what changes no picture to what costs most. GGUF needs a file of its own, and is chosen only by name."""
    plain = [each for each in measured.components if not each.halves and len(each.stages) == 1]
    denoisers = [each.name for each in plain if each.is_denoiser]
    encoders = [each.name for each in plain if each.stages == ("encoder",) and each.loaded >= WORTH_THE_TROUBLE]
    packed = {each.name for each in plain if not each.is_quantised}
    eight: Scheme = card.eight_bits

    def levers(of_denoisers: Scheme | None, of_encoders: Scheme | None, *offloaded: str) -> Levers:
        named = {**dict.fromkeys(denoisers, of_denoisers), **dict.fromkeys(encoders, of_encoders)}
        precision = {n: s for n, s in named.items() if s and n in packed}
        return Levers(precision, frozenset(offloaded))

    first: list[Scheme | None] = [None, eight, "nf4"] if wishes.precision is None else [wishes.precision]
    rungs = []
    for scheme in first:
        rungs += [levers(scheme, None)]
        rungs += [levers(scheme, eight)] if scheme and scheme not in PLAIN else []
        rungs += [levers(scheme, None, *encoders)]
    rungs += [levers(None, None, *encoders, *denoisers)] if wishes.precision is None else []
    return [rung for number, rung in enumerate(rungs) if rung not in rungs[:number]]


def arguments(choice: Choice) -> dict[str, Any]:
    """Of the Serve config."""
    args: dict[str, Any] = {"placement": choice.placement, "denoising": {"max_batch_size": choice.max_batch_size}}
    if choice.levers.precision:
        args["precision"] = dict(choice.levers.precision)
    if choice.levers.offloaded:
        args["offload"] = dict.fromkeys(sorted(choice.levers.offloaded), "group")
    if choice.parallel:
        args["parallel"] = dict(choice.parallel)
    if choice.tiling:
        args["vae"] = {"tiling": "on"}
    return args


class _Search:
    def __init__(self, measured: Measured, card: Card, num_cards: int, placements: Placements, wishes: Wishes) -> None:
        self.measured, self.card, self.num_cards = measured, card, num_cards
        self.placements, self.wishes = placements, wishes
        together = PICTURES_TOGETHER if measured.num_frames == 1 else VIDEOS_TOGETHER
        self.sizes = (wishes.max_batch_size,) if wishes.max_batch_size else together
        self.room = usable(card.num_bytes)

    def choices(self) -> Iterator[Choice]:
        tilings = (False, True) if self.measured.can_tile else (False,)
        spread = list(spreads(self.measured, self.num_cards, self.wishes.parallel))
        for levers, tiling, over, size, placement in product(
            ladder(self.measured, self.card, self.wishes), tilings, spread, self.sizes, self.placements
        ):
            if are_possible(self.measured, over.parallel, levers) and not self._is_idle(over, placement):
                yield Choice(placement, levers, tiling, size, over.apart, over.parallel)

    def _is_idle(self, spread: Spread, placement: str) -> bool:
        """The card for what is apart would hold nothing."""
        return spread.apart and len(self.placements[placement]) == 1

    def demands(self, choice: Choice) -> tuple[Demand, ...]:
        return demands(self.measured, choice, self.placements[choice.placement])

    def needed(self, choice: Choice) -> int:
        """Bytes on the fullest card."""
        return max(needed(self.demands(choice)).values())

    def fits(self, choice: Choice) -> bool:
        return self.needed(choice) <= self.room

    def least(self, **fixed: Any) -> Choice:
        """The choice that needs the least, among those with these values."""
        fitting = [c for c in self.choices() if all(getattr(c, name) == value for name, value in fixed.items())]
        return min(fitting, key=self.needed)

    def rows(self) -> Iterator[Row]:
        for levers, placement in product(ladder(self.measured, self.card, self.wishes), self.placements):
            choice = Choice(placement, levers, False, self.sizes[0], False)
            yield Row(placement, str(levers), self.needed(choice), self.fits(choice))

    def why_nothing_fits(self) -> str:
        least = self.least()
        return (
            f"Nothing fits: the least, {least.levers} in {least.placement} with max_batch_size "
            f"{least.max_batch_size}{' and a tiled VAE' if least.tiling else ''}, needs {gb(self.needed(least))} of "
            f"the {gb(self.room)} that can be counted on."
        )

    def why(self, chosen: Choice) -> Iterator[str]:
        """A sentence for what fits, and one for each thing that is not as one would like it best."""
        yield from self._what_fits(chosen)
        best = next(self.choices())
        if chosen.levers != best.levers:
            least = self.least(levers=best.levers)
            yield f"{capital(str(chosen.levers))}, because {best.levers} would need at least {self._of(least)}."
        if chosen.parallel:
            yield from self._why_ranks(chosen)
        elif chosen.apart:
            least = self.least(levers=chosen.levers, tiling=chosen.tiling, apart=False, parallel={})
            yield f"The denoiser has a card of its own, because on one card all would need at least {self._of(least)}."
        if chosen.tiling:
            least = self.least(levers=chosen.levers, tiling=False)
            yield f"The VAE decodes in tiles, because without them it would be at least {self._of(least)}."
        if chosen.max_batch_size != self.sizes[0]:
            larger = self.sizes[self.sizes.index(chosen.max_batch_size) - 1]
            same = {"levers": chosen.levers, "apart": chosen.apart, "parallel": chosen.parallel}
            least = self.least(**same, tiling=chosen.tiling, max_batch_size=larger)
            yield f"max_batch_size {chosen.max_batch_size}, because {larger} would need {self._of(least)}."
        names = list(self.placements)
        for other in names[: names.index(chosen.placement)]:
            if not (chosen.apart and len(self.placements[other]) == 1):
                more = replace(chosen, placement=other)
                yield f"{chosen.placement}, because {other} would need {self._of(more)}."
        if self.measured.num_frames > 1:
            yield "max_batch_size 1, because the forward of one video fills a GPU: merging would only make others wait."

    def _why_ranks(self, chosen: Choice) -> Iterator[str]:
        """Why several cards make a forward together, what that splits, and what stays whole."""
        ways = " and ".join(f"{way} {degree}" for way, degree in chosen.parallel.items())
        why = ""
        if self.wishes.parallel is None:
            least = self.least(levers=chosen.levers, tiling=chosen.tiling, parallel={})
            why = f", because on one card it would be at least {self._of(least)}"
        yield f"{chosen.num_ranks} ranks make each forward together ({ways}){why}."
        for way in chosen.parallel:
            if way in HELPS:
                yield f"{capital(way)} splits {HELPS[way]}."

    def _what_fits(self, chosen: Choice) -> Iterator[str]:
        totals = needed(self.demands(chosen))
        for card, total in sorted(totals.items()):
            here = [demand for demand in self.demands(chosen) if demand.card == card]
            parts = ", ".join(f"{d.name} {gb(d.total)}" for d in here)
            which = self.card.name if len(totals) == 1 else f"{self.card.name}, the {ORDINALS[card]}"
            yield (
                f"{gb(total)} of {gb(self.card.num_bytes)} on {which} ({parts}); {gb(self.room - total)} are left "
                f"beside the {KEPT_FREE:.0%} that are kept free."
            )

    def _of(self, choice: Choice) -> str:
        return f"{gb(self.needed(choice))} of {gb(self.room)}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def gb(num_bytes: int) -> str:
    """10^9 bytes."""
    return f"{num_bytes / 1e9:.1f} GB"
