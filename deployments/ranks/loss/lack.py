"""Forwards for which a rank lacked memory while the others went on: what a group tells the next one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.latents import shape_of_sample
from deployments.engine.batching.merging import Merger

DEATHS = 2  # of groups, one after another: the next one refuses such forwards
REFUSED_S = 3600.0  # another process on the device may have been the reason: then they are tried again


@dataclass(frozen=True)
class Lack:
    """Of a component, for so many samples at once of a shape."""

    component: str
    shape: str  # of a sample's latents, as deployments.engine.batching.latents tells it
    samples: int
    deaths: int = 1  # groups that ended by it
    noted_at: float = field(default_factory=time.time, compare=False)

    def is_old(self, now: float) -> bool:
        return now - self.noted_at >= REFUSED_S

    def __str__(self) -> str:
        return f"{self.samples} samples of {self.shape or 'no shape'} in {self.component}"

    def is_of(self, component: str, shape: str) -> bool:
        return (self.component, self.shape) == (component, shape)


class LackRecord(Protocol):
    """Outlives the group."""

    def known(self) -> Sequence[Lack]:
        """Those of the groups before."""
        ...

    def add(self, lack: Lack) -> None:
        """Raises nothing."""
        ...


class NoRecord:
    """Of a group that none comes after."""

    def known(self) -> Sequence[Lack]:
        return ()

    def add(self, lack: Lack) -> None:
        """It has no successor that would ask."""


def lack_of(component: str, arguments: dict[str, Any], axes: BatchAxes | None) -> Lack:
    """That of a forward with these arguments."""
    return Lack(component, shape_of_sample(arguments), Merger(axes).num_samples(arguments))


def with_another(known: Sequence[Lack], new: Lack) -> tuple[Lack, ...]:
    """One for each component and shape: the smallest number of samples that did not fit."""
    alike = [each for each in known if each.is_of(new.component, new.shape)]
    others = [each for each in known if each not in alike]
    samples = min(each.samples for each in (*alike, new))
    return (*others, replace(new, samples=samples, deaths=1 + max((each.deaths for each in alike), default=0)))


def lack_among(lacks: Sequence[Lack], component: str, arguments: dict[str, Any], axes: BatchAxes | None) -> Lack | None:
    """The one that says that a forward with these arguments does not fit."""
    if not lacks:
        return None
    asked = lack_of(component, arguments, axes)
    return next((e for e in lacks if e.is_of(component, asked.shape) and asked.samples >= e.samples), None)


def ended_by(lack: Lack) -> str:
    groups = "a group" if lack.deaths == 1 else f"{lack.deaths} groups"
    return f"parallel: out of memory: {groups} of ranks ended by {lack}"


class Refusals:
    """Of forwards by which so many groups have ended."""

    def __init__(self, lacks: Sequence[Lack], now: Callable[[], float] = time.time, deaths: int = DEATHS) -> None:
        self._lacks = [each for each in lacks if each.deaths >= deaths]
        self._now = now

    def reason(self, component: str, arguments: dict[str, Any], axes: BatchAxes | None) -> str | None:
        """Why the forward is not tried."""
        lack = lack_among(self._lacks, component, arguments, axes)
        return None if lack is None or lack.is_old(self._now()) else ended_by(lack)
