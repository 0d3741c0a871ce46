"""How many of the forwards that wait share the next batch: as many as let all of them be done soonest on average."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from deployments.engine.fiber import Fiber
from deployments.engine.forward import Forward
from deployments.engine.step_costs import StepCosts

Merging = Literal["auto", "always"]
GuidancePasses = Literal["apart", "together", "auto"]  # what several forwards that one fiber waits for do

WORTH_IT = 0.95  # of what the parts cost alone; a batch that costs more is within the noise of no gain
EXPLORING_SHARE = 0.01  # of the time that forwards of the structure take: what may be spent to try a merge
SUSPICIOUS = 1.25  # times its parts: what a first batch costs that compiled, or searched for kernels


@dataclass
class _Trials:
    """Of one structure: what its lone forwards have taken since its merge was tried, and how often that did not pay."""

    seconds: float = 0.0
    failures: int = 0


class Joining:
    """Learns what batches cost.

    Of k equal requests, one after another in batches of b forwards that take c(b) seconds, the mean time to the end is
    (k + b) / 2 * c(b) / b for each step: with b = 1 that is first come, first served. Where time grows with the samples
    the least is at b = 1, where batches are free at b = k.

    A fiber may wait for several forwards, its passes: it goes on when the last of them is done. Of such fibers k and b
    count fibers, and a batch never ends between the passes of one.
    """

    def __init__(self, costs: StepCosts, merging: Merging = "auto", guidance_passes: GuidancePasses = "apart") -> None:
        self._costs = costs
        self.always = merging == "always"
        self._keeps_passes_together = guidance_passes == "together"
        self._trials: dict[Hashable, _Trials] = {}

    def size(self, alike: Sequence[Forward], num_waiting: int, now: float) -> int:
        """How many of the first of `alike`, whose merge is verified; forwards of `num_waiting` fibers would like to."""
        if self.always:
            return len(alike)
        seconds, ends = self._seconds(alike), list(accumulate(map(len, passes_of(alike))))
        first = ends[0]  # passes of the first fiber
        if seconds is None:
            return first if self._keeps_passes_together else 1
        alone = list(accumulate(seconds(each.num_samples) for each in alike))
        together = [seconds(samples) for samples in accumulate(each.num_samples for each in alike)]
        means = {} if first > 1 and self._keeps_passes_together else {1: (num_waiting + 1) * alone[first - 1]}
        for fibers, size in enumerate(ends, start=1):
            pays = together[size - 1] <= WORTH_IT * alone[size - 1]
            is_settled = size == first and self._keeps_passes_together
            if is_settled or (pays and self._makes_nobody_late(alike[:size], together[size - 1], seconds, now)):
                means.setdefault(size, (num_waiting + fibers) * together[size - 1] / fibers)
        return min(means, key=means.__getitem__)

    def _makes_nobody_late(
        self, batch: Sequence[Forward], together_s: float, seconds: Callable[[int], float], now: float
    ) -> bool:
        """Of those whose caller set a deadline that they will reach if each goes on alone from here."""
        for passes in passes_of(batch):
            fiber, alone_s = passes[0].fiber, sum(seconds(each.num_samples) for each in passes)
            if fiber.deadline is not None:
                left_s, remaining = fiber.deadline - now, fiber.remaining_forwards() / len(passes)
                if alone_s * remaining <= left_s < together_s * remaining:
                    return False
        return True

    def size_of_trial(self, alike: Sequence[Forward]) -> int:
        """How many of `alike`, whose merge is not verified, run in the turn that tries it; 1: it is not tried now."""
        if self.always:
            return len(alike)
        first = len(passes_of(alike)[0])
        if first > 1 and self._keeps_passes_together:
            return first
        return 2 if self._may_explore(alike) else 1

    def _may_explore(self, alike: Sequence[Forward]) -> bool:
        """At the cost of two of them done once more."""
        seconds = self._seconds(alike)
        if seconds is None:
            return False
        trials = self._trials.get(alike[0].structure, _Trials())
        to_come = sum(
            passes[0].fiber.remaining_forwards() * seconds(passes[0].num_samples) for passes in passes_of(alike)
        )
        cost = sum(seconds(each.num_samples) for each in alike[:2]) * 2.0**trials.failures
        return cost <= EXPLORING_SHARE * (trials.seconds + (0.0 if trials.failures else to_come))

    def is_settled(self, batch: Sequence[Forward]) -> bool:
        """Whether these share a batch whatever it costs."""
        return self.always or self.keeps_together(batch)

    def keeps_together(self, batch: Sequence[Forward]) -> bool:
        """Whether these are passes of one fiber that are to give the numbers of a batch each time."""
        return self._keeps_passes_together and all(forward.fiber is batch[0].fiber for forward in batch)

    def pays(self, together_s: float, alone_s: float) -> bool:
        return self.always or together_s <= WORTH_IT * alone_s

    def is_suspicious(self, together_s: float, alone_s: float) -> bool:
        """Whether a first measurement may be of something else than the forward."""
        return together_s > SUSPICIOUS * alone_s

    def note_alone(self, structure: Hashable, seconds: float) -> None:
        """A lone forward has run."""
        self._trials.setdefault(structure, _Trials()).seconds += seconds

    def note_vain_trial(self, structure: Hashable) -> None:
        """The merge does not pay; it is tried again after twice as many lone forwards, for devices change."""
        self._trials[structure] = _Trials(failures=self._trials.get(structure, _Trials()).failures + 1)

    def clear(self) -> None:
        self._trials.clear()

    def _seconds(self, alike: Sequence[Forward]) -> Callable[[int], float] | None:
        """By number of samples; None before the first forward of the structure was measured."""
        structure = alike[0].structure
        if self._costs.predict(structure, 1) is None:
            return None
        return lambda samples: self._costs.predict(structure, samples) or 0.0


def passes_of(forwards: Sequence[Forward]) -> list[list[Forward]]:
    """The forwards of each fiber, in the order of the fibers' first ones."""
    of_fibers: dict[Fiber, list[Forward]] = {}
    for forward in forwards:
        of_fibers.setdefault(forward.fiber, []).append(forward)
    return list(of_fibers.values())
