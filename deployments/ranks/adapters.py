"""LoRAs of a forward that ranks make: each puts them into its own modules before, and uses them for its own samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.adapters.use import AdapterUse, use_of
from deployments.ranks.portions import NoPortionsError

FAILED_S = 60.0  # a LoRA that a rank could not have is asked for again after that
COMING_S = 1.0  # and one that it is fetching

Run = tuple[int, Mapping[str, float]]  # neighbours that use the same: how many samples, the scales by PEFT's names


@dataclass(frozen=True)
class Used:
    """What the samples of a forward use, in the order of their rows."""

    runs: tuple[Run, ...]
    is_even: bool  # each sample has as many rows as any other

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for _, scales in self.runs for name in scales)

    def portions(self, sizes: Sequence[int]) -> list[Used]:
        """Raises NoPortionsError where these are other samples than the forward's."""
        each = [scales for number, scales in self.runs for _ in range(number)]
        if len(each) != sum(sizes):
            raise NoPortionsError(f"{sum(sizes)} samples with LoRAs for {len(each)}")
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        parts = [each[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return [Used(tuple((1, scales) for scales in part), self.is_even) for part in parts]

    def plain(self) -> dict[str, Any]:
        return {"runs": [[number, dict(scales)] for number, scales in self.runs], "is_even": self.is_even}


def used_of(plain: Mapping[str, Any] | None) -> Used | None:
    """What `Used.plain` has written."""
    if plain is None:
        return None
    return Used(tuple((number, scales) for number, scales in plain["runs"]), plain["is_even"])


@dataclass(frozen=True)
class Absent:
    """LoRAs that a rank does not hold, by PEFT's names."""

    coming: tuple[str, ...] = ()  # they are being fetched
    failed: Mapping[str, str] = field(default_factory=dict)  # with the reason

    def plain(self) -> dict[str, Any]:
        return {"coming": list(self.coming), "failed": dict(self.failed)}


class AdaptersHere(Protocol):
    """Of rank 0, whose requests hold them."""

    def uses(self) -> Mapping[str, AdapterUse]:
        """Those that requests hold now, by PEFT's names."""
        ...

    def used(self, module: Any) -> Used | None:
        """By the forward of the module that is under way; None: it uses none."""
        ...

    def around(self, module: Any, used: Used) -> AbstractContextManager[None]:
        """A forward of these samples."""
        ...


class AdaptersThere(Protocol):
    """Of another rank."""

    def hold(self, uses: Mapping[str, AdapterUse]) -> Absent:
        """These and no others, by PEFT's names; those that it does not hold now."""
        ...

    def around(self, module: Any, used: Used) -> AbstractContextManager[None]: ...


class NoAdapters:
    """AdaptersHere and AdaptersThere of modules that take none."""

    def uses(self) -> Mapping[str, AdapterUse]:
        return {}

    def used(self, module: Any) -> Used | None:
        return None

    def around(self, module: Any, used: Used) -> AbstractContextManager[None]:
        return nullcontext()

    def hold(self, uses: Mapping[str, AdapterUse]) -> Absent:
        return Absent()


def hold_message(uses: Mapping[str, AdapterUse]) -> dict[str, Any]:
    return {"hold": {name: use.plain() for name, use in uses.items()}}


def uses_to_hold(message: Mapping[str, Any]) -> dict[str, AdapterUse]:
    return {name: use_of(plain) for name, plain in message["hold"].items()}


class HeldByOthers:
    """Which LoRAs the other ranks hold, and which of them one lacks: until when, and why."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._holding: frozenset[str] = frozenset()
        self._lacking: dict[str, tuple[str, float]] = {}
        self._failed: set[str] = set()  # of those: not asked for meanwhile

    def has(self, names: frozenset[str]) -> bool:
        return names <= self._holding

    def to_ask(self, names: frozenset[str], uses: Mapping[str, AdapterUse]) -> Mapping[str, AdapterUse]:
        """What they are to hold, for a forward with these names, of all that requests use. Raises NoPortionsError where
        one of them lacks it, and it is too early to ask again."""
        now = self._clock()
        self._lacking = {n: each for n, each in self._lacking.items() if n in uses and now < each[1]}
        self._failed &= self._lacking.keys()
        self._check(names)
        return {name: use for name, use in uses.items() if name not in self._failed}

    def note(self, names: frozenset[str], asked: Collection[str], answers: Mapping[int, Mapping[str, Any]]) -> None:
        """`answers`: Absent as a message, by rank. Raises NoPortionsError where one of these names is lacking."""
        now = self._clock()
        for rank, answer in answers.items():
            for name in answer["coming"]:
                self._lacking.setdefault(name, (f"rank {rank} is still fetching its LoRAs", now + COMING_S))
        for rank, answer in answers.items():
            for name, reason in answer["failed"].items():
                self._lacking[name] = f"rank {rank} cannot use its LoRAs: {reason}", now + FAILED_S
                self._failed.add(name)
        self._holding = frozenset(asked) - self._lacking.keys()
        self._check(names)

    def _check(self, names: frozenset[str]) -> None:
        for name in names & self._lacking.keys():
            raise NoPortionsError(self._lacking[name][0])
