"""How many samples of a structure fit into memory: learned from batches that did not, tried again after good ones."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

GOOD_BATCHES = 32  # as large as the cap allows, before one more forward is tried
MOST_GOOD_BATCHES = 4096  # twice as many after each try that fails


@dataclass
class _Cap:
    samples: int
    needed: int = GOOD_BATCHES
    good: int = 0
    was_raised: bool = False


class Caps:
    """Of each structure that did not fit once. Another process on the device may have been the reason: caps recover."""

    def __init__(self) -> None:
        self._caps: dict[Hashable, _Cap] = {}

    def did_not_fit_before(self, structure: Hashable, samples: int, deaths: int) -> None:
        """So many at once ended as many processes before this one, one after another: it begins with fewer."""
        needed = min(GOOD_BATCHES << (deaths - 1), MOST_GOOD_BATCHES)
        self._caps.setdefault(structure, _Cap(max(1, samples // 2), needed))

    def of(self, structure: Hashable) -> int | None:
        """Samples; None: nothing is known to be too large."""
        cap = self._caps.get(structure)
        return None if cap is None else cap.samples

    def does_not_fit(self, structure: Hashable, samples: int) -> None:
        """So many at once."""
        known, half = self._caps.get(structure), max(1, samples // 2)
        if known is None:
            self._caps[structure] = _Cap(half)
        else:
            needed = min(2 * known.needed, MOST_GOOD_BATCHES) if known.was_raised else known.needed
            self._caps[structure] = _Cap(min(half, known.samples), needed)

    def fits(self, structure: Hashable, samples: int, samples_of_one: int) -> None:
        """A batch has run; `samples_of_one` are those of one of its forwards."""
        cap = self._caps.get(structure)
        if cap is None or samples + samples_of_one <= cap.samples:
            return  # not as large as it might have been
        if samples > cap.samples:  # the larger half of one that did not fit
            cap.samples = samples
        cap.good += 1
        if cap.good >= cap.needed:
            cap.samples, cap.good, cap.was_raised = max(cap.samples, samples) + samples_of_one, 0, True

    def clear(self) -> None:
        self._caps.clear()
