"""Which forwards of a structure share a batch though their samples are surrounded differently: those whose kind of
surrounding was seen to be right in such a batch.

That forwards merge says nothing of it: where all are surrounded alike, no sample can be taken for another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from deployments.engine.forward import Forward, Structure

TRIES = 3  # of a value that show nothing, before it is given up
VALUES_KEPT = 4096


@dataclass(frozen=True)
class Sharing:
    """Of the forwards that wait: those that may share the batch of the first, and a pair that could be tried."""

    batch: list[Forward]
    untried: list[Forward]  # empty: there is nothing to try


class Mixing:
    """What was seen of each kind of surrounding, by structure."""

    def __init__(self) -> None:
        self._is_right: dict[tuple[Structure, Hashable], bool] = {}  # by kind
        self._vain: Counter[tuple[Structure, Hashable]] = Counter()  # by value: tries that have shown nothing

    def sharing(self, alike: Sequence[Forward]) -> Sharing:
        """`alike` are of one structure."""
        first, others = alike[0], [forward for forward in alike if forward.value != alike[0].value]
        if not others:
            return Sharing(list(alike), [])
        seen = self._seen(first)
        equal = [forward for forward in alike if forward.value == first.value]
        if seen is False:
            return Sharing(equal, [])
        untried = [f for f in others if self._seen(f) is None or (seen is None and self._seen(f))]
        return Sharing([f for f in alike if self._seen(f)] if seen else equal, [first, untried[0]] if untried else [])

    def is_right(self, batch: Sequence[Forward]) -> bool:
        """Whether the samples of these may lie in one batch."""
        return all(forward.value == batch[0].value for forward in batch) or all(map(self._seen, batch))

    def note_right(self, pair: Sequence[Forward]) -> None:
        """A batch of the two, whose values differ, gave what each gives alone."""
        self._note(self._untried(pair), True)

    def note_wrong(self, pair: Sequence[Forward]) -> None:
        """It did not. Of two that were not tried before nobody knows whose fault that is."""
        untried = self._untried(pair)
        if len({_kind_of(forward) for forward in untried}) > 1:
            self.note_vain(pair)
            return
        self._note(untried, False)

    def note_vain(self, pair: Sequence[Forward]) -> None:
        """It has shown nothing."""
        if len(self._vain) >= VALUES_KEPT:
            self._vain.clear()
        self._vain.update((forward.structure, forward.value) for forward in self._untried(pair))

    def clear(self) -> None:
        self._is_right.clear()
        self._vain.clear()

    def _note(self, forwards: Sequence[Forward], is_right: bool) -> None:
        if len(self._is_right) >= VALUES_KEPT:  # callers choose what they mix
            self._is_right.clear()
        self._is_right.update({(forward.structure, _kind_of(forward)): is_right for forward in forwards})

    def _untried(self, pair: Sequence[Forward]) -> list[Forward]:
        return [f for f in pair if f.per_sample and (f.structure, _kind_of(f)) not in self._is_right]

    def _seen(self, forward: Forward) -> bool | None:
        """None: it was not tried yet."""
        if forward.per_sample is None:
            return True
        is_right = self._is_right.get((forward.structure, _kind_of(forward)))
        if is_right is None and self._vain[forward.structure, forward.value] >= TRIES:
            return False
        return is_right


def _kind_of(forward: Forward) -> Hashable:
    return forward.per_sample and forward.per_sample.kind
