"""What a choice of placement, precision, tiling and offload needs on each card: sums of what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod

from deployments.messages import StageName
from deployments.plan.measured import PLAIN, Component, Measured, Scheme

CONTEXT = 500_000_000  # bytes that a process takes on a card before it holds anything: estimated, not measured
KEPT_FREE = 0.03  # of a card: what libraries take as workspaces, and what an allocator cannot put together
UNUSED_HALF: dict[StageName, str] = {
    "encoder": "decoder",
    "vae": "encoder",
}  # of an autoencoder, where a stage is alone
Processes = tuple[tuple[str, tuple[StageName, ...]], ...]  # the deployment's name, the stages that it runs


@dataclass(frozen=True)
class Levers:
    """What is done to the weights, by component: those that are not named are held as they are loaded.

    `offloaded`: they stay in the host's memory, and come to the card a few layers at a time.
    """

    precision: Mapping[str, Scheme] = field(default_factory=dict)
    offloaded: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """In words."""
        names: dict[str, list[str]] = {}
        for name, scheme in self.precision.items():
            names.setdefault(f"in {scheme}", []).append(name)
        if self.offloaded:
            names["offloaded in groups"] = sorted(self.offloaded)
        return ", ".join(f"{' and '.join(each)} {what}" for what, each in names.items()) or "weights as they are loaded"


@dataclass(frozen=True)
class Choice:
    """`apart`: the denoiser has a card of its own, the other processes share another one.

    `parallel`: the ways by which each replica of the denoiser is split, and the number of ranks of each way; a rank has
    a card of its own, and what is not `apart` shares that of the first.
    """

    placement: str
    levers: Levers = field(default_factory=Levers)
    tiling: bool = False
    max_batch_size: int = 1
    apart: bool = False
    parallel: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        return prod(self.parallel.values())


@dataclass(frozen=True)
class Demand:
    """Bytes that one process needs, and on which card (0, 1, ...). A denoiser has a process for each of its ranks."""

    process: str
    stages: tuple[StageName, ...]
    card: int
    weights: int
    activations: int
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.process}, rank {self.rank}" if self.rank else self.process

    @property
    def total(self) -> int:
        return CONTEXT + self.weights + self.activations


def demands(
    measured: Measured, choice: Choice, processes: Processes, cards: Mapping[str, int] | None = None
) -> tuple[Demand, ...]:
    """One for each process of the choice's placement; `cards` says on which each is, where `choice.apart` does not: by
    the names that the demands have."""
    found = (each for name, stages in processes for each in demands_of(measured, choice, name, stages))
    return tuple(replace(each, card=cards[each.name]) for each in found) if cards else tuple(found)


def demands_of(measured: Measured, choice: Choice, name: str, stages: tuple[StageName, ...]) -> Iterator[Demand]:
    """Of a process, and of the ranks beside it, which hold denoisers alone."""

    def needs(stages: tuple[StageName, ...], card: int, rank: int) -> Demand:
        here = [each for each in measured.components if set(each.stages) & set(stages)]
        weights = sum(weight(each, stages, choice.levers, choice.parallel.get("tensor", 1)) for each in here)
        return Demand(name, stages, card, weights, activations(measured, stages, choice), rank)

    denoises = "denoiser" in stages
    yield needs(stages, choice.num_ranks if choice.apart and not denoises else 0, 0)
    for rank in range(1, choice.num_ranks if denoises else 1):
        yield needs(("denoiser",), rank, rank)


def needed(demanded: Iterable[Demand]) -> dict[int, int]:
    """Bytes by card."""
    totals: dict[int, int] = {}
    for demand in demanded:
        totals[demand.card] = totals.get(demand.card, 0) + demand.total
    return totals


def usable(num_bytes: int) -> int:
    return int(num_bytes * (1 - KEPT_FREE))


def weight(component: Component, stages: Sequence[StageName], levers: Levers, tensor: int = 1) -> int:
    """Bytes that a process of these stages holds of the component at once; `tensor`: ranks that split its weights."""
    whole = whole_weight(component, stages, levers)
    split = whole * component.tensor_bytes // component.loaded if tensor > 1 and component.loaded else 0
    return whole - split + ceil(split / tensor)


def whole_weight(component: Component, stages: Sequence[StageName], levers: Levers) -> int:
    if component.name in levers.offloaded:
        return min(component.loaded, 2 * component.largest_block + component.outside_blocks)
    if scheme := levers.precision.get(component.name):
        return component.weights.get(scheme, component.loaded)
    unused = UNUSED_HALF.get(stages[0]) if len(stages) == 1 else None
    return component.loaded - component.halves.get(unused or "", 0)


def activations(measured: Measured, stages: Sequence[StageName], choice: Choice) -> int:
    """At most at once: an engine's thread encodes or denoises while another decodes; without an engine, one of them."""
    encoding = measured.peak("encoder") + unpacked(measured, "encoder", choice.levers) if "encoder" in stages else 0
    decoding = measured.peak("vae", choice.tiling) if "vae" in stages else 0
    if "denoiser" not in stages:
        return max(encoding, decoding)
    denoising = denoising_peak(measured, choice) + unpacked(measured, "denoiser", choice.levers)
    return max(encoding, denoising) + decoding


def denoising_peak(measured: Measured, choice: Choice) -> int:
    """Of one rank: its part of the samples, and of each its part of the sequence, which is most of what lives at once.

    With `tensor` a rank holds the whole sequence. An estimate: the whole arguments and outputs, which each rank has
    too, are a few MB.
    """
    samples = ceil(choice.max_batch_size / choice.parallel.get("batch", 1))
    sequence = choice.parallel.get("ulysses", 1) * choice.parallel.get("ring", 1)
    return ceil(samples * measured.peak("denoiser") / sequence)


def unpacked(measured: Measured, stage: StageName, levers: Levers) -> int:
    """Bytes of the largest quantised layer in bfloat16, which its matrix product reads."""
    packed = [
        each
        for each in measured.components
        if each.stages == (stage,) and (each.is_quantised or levers.precision.get(each.name, "bf16") not in PLAIN)
    ]
    return max((each.largest_layer for each in packed), default=0)


def shares(demanded: Sequence[Demand]) -> Mapping[str, float]:
    """`num_gpus` of each process: its part of what is needed on its card, in steps of 0.05 that add up to 1.

    A denoiser has more than half of its card, so that Ray never puts two on one; its other ranks have as much as it.
    """
    found: dict[str, float] = {}
    firsts = [demand for demand in demanded if not demand.rank]
    for card in {demand.card for demand in firsts}:
        here = sorted((d for d in firsts if d.card == card), key=lambda d: ("denoiser" not in d.stages, -d.total))
        total, left = sum(demand.total for demand in here), 20
        for demand in reversed(here[1:]):
            part = max(1, min(round(20 * demand.total / total), 9 if len(here) == 2 else 4))
            found[demand.process], left = part / 20, left - part
        found[here[0].process] = left / 20
    return found
