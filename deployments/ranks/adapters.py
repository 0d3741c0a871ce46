"""LoRAs of a forward that ranks make: each puts them into its own modules before, and uses them for its own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.adapters.use import AdapterUse, use_of
from deployments.ranks.portions import NoPortionsError

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

    def hold(self, uses: Sequence[AdapterUse]) -> None:
        """These and no others. Raises what fetching them and putting them in raises."""
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

    def hold(self, uses: Sequence[AdapterUse]) -> None:
        """There are none."""


def hold_message(uses: Mapping[str, AdapterUse]) -> dict[str, Any]:
    return {"hold": [use.plain() for use in uses.values()]}


def uses_to_hold(message: Mapping[str, Any]) -> list[AdapterUse]:
    return [use_of(plain) for plain in message["hold"]]
