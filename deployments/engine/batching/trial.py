"""The first merge of a structure: is it worth its while, and is a merged forward the lone one but for rounding?"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from deployments.engine.batching.axes import Path
from deployments.engine.batching.closeness import bound, deviation, is_same
from deployments.engine.batching.variation import varied
from deployments.engine.forward import Forward
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.watched import Watched

if TYPE_CHECKING:
    from deployments.engine.batching.batches import Batches

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """Of a structure."""

    pays: bool  # False: nothing is known but that it costs as much as the parts
    shared: frozenset[Path] | None = None  # what merged forwards are given once; None: they are never merged
    reason: str = ""
    shows: bool = True  # False: what surrounds the two makes so little difference that a mistake would not be seen


class Trial:
    """Of the first two forwards of a batch; the lone outputs of all are what their fibers get.

    What it costs beyond them: one merged forward of two samples where that does not pay. Where it does, another one
    that shows the noise floor, and a third with a lone one where the two have an argument in common.
    """

    def __init__(self, batches: Batches, batch: list[Forward], known: frozenset[Path] | None = None) -> None:
        """`known`: what merged forwards of the structure are given once, where these were verified before."""
        self._batches = batches
        self._batch = batch
        first_merger = batch[0].merger
        assert first_merger is not None
        self._merger = first_merger
        self._pair = batch[:2]
        self._known = known
        self.is_mixed = batch[0].value != batch[1].value  # samples that are surrounded differently
        self._is_written = False
        self._alone: list[Any] = []
        self._alone_s: list[float | None] = []  # None: something was compiled meanwhile, which is no measure

    def lone_outputs(self) -> list[Any]:
        for forward in self._batch:
            watched = Watched(forward.arguments)
            output, seconds = self._timed(partial(self._batches.call, forward, forward.arguments))
            self._alone.append(output)
            self._alone_s.append(seconds)
            self._is_written |= watched.is_written()
            self._record(forward.num_samples, seconds)
        return self._alone

    def verdict(self) -> Verdict | None:
        """After `lone_outputs`; None where what was compiled meanwhile hides it. Raises where the device has no memory
        for a batch of two."""
        if self._is_written:
            return Verdict(True, None, "they write into what they are given")
        guesses = self._merger.shared_guesses([forward.arguments for forward in self._pair])
        for shared in guesses if self._known is None else [self._known]:
            try:
                merged, pays = self._merged_and_pays(shared)
                if pays is None:
                    return None
                if not pays:
                    return Verdict(False)
                # Not kept: it knows this trial, and in a circle the tensors would stay until the next collection.
                noise = Noise(partial(self._merged_with_itself, shared))
                if self._is_right(shared, merged, noise):
                    return Verdict(True, shared, shows=not self.is_mixed or self._would_show(noise))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                logger.info("%s does not merge so: %s", self._pair[0].component, error)  # a wrong guess of the axes
        return Verdict(True, None, "merged ones deviate")

    def _merged_and_pays(self, shared: frozenset[Path]) -> tuple[list[Any], bool | None]:
        joining, alone_s = self._batches.joining, _sum(self._alone_s[:2])
        merged, together_s = self._timed(lambda: self._call_merged(self._pair, shared))
        if together_s is None or self._is_suspicious(together_s, alone_s):
            merged, together_s = self._timed(lambda: self._call_merged(self._pair, shared))
        self._record(sum(forward.num_samples for forward in self._pair), together_s)
        if joining.is_settled(self._pair):
            return merged, True
        return merged, None if together_s is None or alone_s is None else joining.pays(together_s, alone_s)

    def _is_suspicious(self, together_s: float, alone_s: float | None) -> bool:
        joining = self._batches.joining
        return alone_s is not None and (
            not joining.pays(together_s, alone_s) and joining.is_suspicious(together_s, alone_s)
        )

    def _record(self, num_samples: int, seconds: float | None) -> None:
        if seconds is not None:
            self._batches.costs.record(self._pair[0].structure, num_samples, seconds)

    def _is_right(self, shared: frozenset[Path], merged: list[Any], noise: Noise) -> bool:
        if not noise.explains(self._pair, merged, self._alone):
            return False
        if self._merger.by_position and not all(
            is_same(copied, output)
            for forward, output in zip(self._pair, merged, strict=True)
            for copied in noise.copies(forward)
        ):
            # What surrounds these forwards may mix samples by so little that rounding hides it.
            return False
        return self._is_right_where_all_differs(shared, noise)

    def _is_right_where_all_differs(self, shared: frozenset[Path], noise: Noise) -> bool:
        """An argument that both have in common would be right along any axis."""
        first, second = self._pair
        arguments = varied(second.arguments, first.arguments, self._merger, second.num_samples, shared)
        if arguments is None:
            return True
        other = copy.copy(second)
        other.arguments = arguments
        try:
            alone = self._batches.call(other, arguments)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.info("%s takes no other argument to be tried: %s", first.component, error)
            return True
        return noise.explains([first, other], self._call_merged([first, other], shared), [self._alone[0], alone])

    def _would_show(self, noise: Noise) -> bool:
        """Whether the first forward, surrounded as the second, is another: else no mistake of the two would be seen."""
        swapped = copy.copy(self._pair[0])
        swapped.per_sample = self._pair[1].per_sample
        apart = deviation(self._batches.call(swapped, swapped.arguments), self._alone[0])
        return apart > bound(self._alone[0], noise.floor(self._pair[0], self._alone[0]))

    def _merged_with_itself(self, shared: frozenset[Path], forward: Forward) -> list[Any]:
        return self._call_merged([forward, forward], shared)

    def _call_merged(self, batch: list[Forward], shared: frozenset[Path]) -> list[Any]:
        return self._batches.call_merged(batch, self._merger, shared)

    def _timed(self, call: Callable[[], Any]) -> tuple[Any, float | None]:
        executor, compilation_s = self._batches.executor, self._batches.compilation_s
        before, begun = compilation_s(), executor.mark()
        output = call()
        ended = executor.mark()
        ended.wait()
        return output, ended.seconds_since(begun) if compilation_s() == before else None


def _sum(seconds: list[float | None]) -> float | None:
    known = [each for each in seconds if each is not None]
    return sum(known) if len(known) == len(seconds) else None


class Noise:
    """How much a forward deviates from itself alone when it is merged with itself."""

    def __init__(self, merged_with_itself: Callable[[Forward], list[Any]]) -> None:
        self._merged_with_itself = merged_with_itself
        self._copies: dict[Forward, list[Any]] = {}

    def copies(self, forward: Forward) -> list[Any]:
        if forward not in self._copies:
            self._copies[forward] = self._merged_with_itself(forward)
        return self._copies[forward]

    def explains(self, pair: list[Forward], merged: list[Any], alone: list[Any]) -> bool:
        """Whether merged and lone outputs are alike but for rounding.

        By the noise of the first; that of the second is asked for only where the first's is not enough.
        """
        first_floor = self.floor(pair[0], alone[0])
        if deviation(merged[0], alone[0]) > bound(alone[0], first_floor):
            return False
        apart = deviation(merged[1], alone[1])
        return apart <= bound(alone[1], first_floor) or apart <= bound(alone[1], self.floor(pair[1], alone[1]))

    def floor(self, forward: Forward, alone: Any) -> float:
        """The largest deviation of the two copies."""
        return max(deviation(copied, alone) for copied in self.copies(forward))
