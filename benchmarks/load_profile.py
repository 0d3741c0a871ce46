"""Loads that swing: how many requests come when, and of which kinds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cluster_simulation import Arrival, RequestKind, Stage

SWING = 30  # between the least and the most load
STEP_S = 0.25  # the load is constant for so long


@dataclass(frozen=True)
class Profile:
    """`share` of the most load and share of the second kind of request, both by the time in seconds."""

    says: str
    duration_s: float
    share: Callable[[float], float]
    second_kind: Callable[[float], float] = lambda time_s: 0.5


def wave(time_s: float) -> float:
    """From 1/30 to 1 and back in half an hour."""
    return float(SWING ** (-(1 + math.cos(2 * math.pi * time_s / 1800)) / 2))


def burst(time_s: float) -> float:
    """Quiet for fifteen minutes, then thirty times as much at once, for ten."""
    return 1.0 if time_s % 1500 >= 900 else 1 / SWING


def turns(time_s: float) -> float:
    """Twenty minutes of one kind, twenty of the other."""
    return float(time_s % 2400 >= 1200)


PROFILES = {
    "wave": Profile("30-fold up and down in half an hour, twice", 3600, wave),
    "burst": Profile("30-fold at once, for ten minutes, twice", 3000, burst),
    "change of mix": Profile("the same load, but every 20 minutes of the other kind", 3600, lambda _: 1.0, turns),
}


def weights(kinds: Sequence[RequestKind], second: float) -> Sequence[float]:
    return (1.0,) if len(kinds) == 1 else (1 - second, second)


def work_by_stage(stages: Sequence[Stage], kinds: Sequence[RequestKind], second: float) -> list[float]:
    """Accelerator seconds of a mean request in each stage, in full batches."""
    return work_of_mix(stages, kinds, weights(kinds, second))


def work_of_mix(stages: Sequence[Stage], kinds: Sequence[RequestKind], mix: Sequence[float]) -> list[float]:
    """The same for a mix of kinds, each with its share of the requests."""
    return [
        stage.least_cost
        * stage.accelerators
        * sum(w * kind.seconds_in(number) for w, kind in zip(mix, kinds, strict=True) if number in kind.stages)
        for number, stage in enumerate(stages)
    ]


def mean_second_kind(profile: Profile, stages: Sequence[Stage], kinds: Sequence[RequestKind]) -> float:
    """The share of all requests that are of the second kind."""
    times = [STEP_S * step for step in range(int(profile.duration_s / STEP_S))]
    rates = [profile.share(t) / sum(work_by_stage(stages, kinds, profile.second_kind(t))) for t in times]
    return sum(rate * profile.second_kind(t) for rate, t in zip(rates, times, strict=True)) / sum(rates)


def arrivals_of(
    profile: Profile,
    stages: Sequence[Stage],
    kinds: Sequence[RequestKind],
    num_accelerators: int,
    peak: float,
    seed: int,
    scale_s: float = 1.0,
) -> list[Arrival]:
    """Poisson arrivals of one or two kinds. At the most load they bring `peak` of the work that all accelerators
    could do, were they split as the kinds of the moment need it. The profile's times are multiplied by `scale_s`."""
    chance, arrivals, time_s = random.Random(seed), [], 0.0
    while time_s < profile.duration_s * scale_s:
        second = profile.second_kind(time_s / scale_s)
        rate = peak * num_accelerators * profile.share(time_s / scale_s) / sum(work_by_stage(stages, kinds, second))
        moment_s = time_s + chance.expovariate(rate)
        while moment_s < time_s + STEP_S:
            [kind] = chance.choices(kinds, weights(kinds, second))
            arrivals.append(Arrival(moment_s, kind))
            moment_s += chance.expovariate(rate)
        time_s += STEP_S
    return arrivals
