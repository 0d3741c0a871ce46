"""Samples that are surrounded differently share a batch once their kind was seen to be right in one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.batches import Batches
from deployments.engine.batching.merging import CannotMergeError, Merger
from deployments.engine.fiber import Fiber
from deployments.engine.forward import Forward, PerSample
from deployments.engine.marks import HostMark
from deployments.engine.statistics import EngineStatistics

Rows = Callable[[Sequence[float]], Sequence[float]]


class Adapted:
    """An executor whose model adds to each row what the surrounding says; `order` mixes the rows up."""

    def __init__(self, order: Rows = list) -> None:
        self.order = order
        self.now: list[float] = []
        self.calls: list[list[float]] = []

    @contextmanager
    def entered(self, values: Sequence[tuple[Any, int]], is_even: bool) -> Iterator[None]:
        now = [value or 0.0 for value, number in values for _ in range(number)]
        if "odd" in now and len(set(now)) > 1:
            raise CannotMergeError
        self.now = now
        yield
        self.now = []

    def run(self, component: str, module: Any, context: Any, arguments: dict[str, Any]) -> Any:
        x = arguments["x"]
        self.calls.append(self.now)
        amounts = self.order(self.now) if self.now else [0.0] * len(x)
        return 2 * x + torch.tensor([0.0 if each == "odd" else each for each in amounts])[:, None]

    def mark(self) -> HostMark:
        return HostMark()

    def free_memory(self) -> None:
        raise AssertionError


class Waiting:
    """Batches of one executor, and forwards of a value each (None: nothing surrounds them)."""

    def __init__(self, order: Rows = list) -> None:
        self.executor = Adapted(order)
        self.batches = Batches(8, None, self.executor, EngineStatistics(), merging="always")

    def forwards(self, *values: Any, samples: int = 1, by_position: bool = False) -> list[Forward]:
        made = []
        for index, value in enumerate(values):
            kind = abs(value) if isinstance(value, float) else value
            per_sample = None if value is None else PerSample(self.executor.entered, value, kind)
            forward = Forward(Fiber("f"), None, "model", None, {"x": torch.full((samples, 4), index + 1.0)})
            forward.per_sample, forward.by_position = per_sample, by_position
            self.batches.classify(forward)
            made.append(forward)
        return made

    def run(self, *values: Any, **settings: Any) -> list[int]:
        """All of them, as the engine does; the sizes of the batches in which they ran."""
        waiting, sizes = self.forwards(*values, **settings), []
        expected = [2 * f.arguments["x"] + (f.value if isinstance(f.value, float) else 0.0) for f in waiting]
        every = list(waiting)
        while waiting:
            batch = self.batches.fill(waiting, now=0.0)
            self.batches.run(batch)
            sizes.append(len(batch))
            waiting = [forward for forward in waiting if forward not in batch]
        for forward, output in zip(every, expected, strict=True):
            assert torch.equal(forward.output, output)
        return sizes


def test_forwards_of_any_values_and_of_none_share_a_batch_after_each_kind_was_tried() -> None:
    waiting = Waiting()
    assert waiting.run(None, 1.0, 2.0) == [2, 1]
    assert waiting.run(None, 1.0, 2.0) == [2, 1], "2.0 is tried beside another"
    assert waiting.run(None, 1.0, 2.0, -2.0) == [4], "another value of a known kind needs no trial"
    assert waiting.executor.calls[-1] == [0.0, 1.0, 2.0, -2.0]


def test_what_was_verified_without_surroundings_or_with_equal_ones_is_verified_again_for_different_ones() -> None:
    waiting = Waiting(order=lambda values: list(reversed(values)))
    assert waiting.run(None, None) == [2]
    assert waiting.run(1.0, 1.0, 1.0) == [3]
    assert waiting.run(None, 1.0, None, 1.0) == [2, 1, 1], "one trial, in which each gets what it gets alone"
    assert waiting.batches.statistics.refused_structures == 1
    assert waiting.run(None, 1.0, 1.0, None) == [2, 2], "with their like"


def test_two_new_kinds_that_are_wrong_are_not_both_given_up_at_once() -> None:
    def wrong_with_seven(values: Sequence[float]) -> Sequence[float]:
        return list(reversed(values)) if 7.0 in values and len(set(values)) > 1 else values

    waiting = Waiting(order=wrong_with_seven)
    assert waiting.run(7.0, 3.0) == [2]
    assert waiting.run(3.0, None) == [2]
    assert waiting.run(3.0, None, None) == [3]
    assert waiting.run(7.0, None) == [2], "its own fault"
    assert waiting.run(7.0, None) == [1, 1]


def test_a_surrounding_too_weak_to_show_a_mistake_proves_nothing() -> None:
    waiting = Waiting(order=lambda values: list(reversed(values)))
    waiting.run(None, None)
    weak = 1e-9
    for _ in range(3):
        assert waiting.run(None, weak, None) == [2, 1]
    assert waiting.run(None, weak, None) == [2, 1]
    assert not waiting.batches.mixing.is_right(waiting.forwards(None, weak))
    strong = PerSample(waiting.executor.entered, 5.0, weak)
    none, other = waiting.forwards(None, weak)
    other.per_sample = strong
    assert waiting.batches.fill([none, other], now=0.0) == [none, other], "its kind was not given up"
    waiting.batches.run([none, other])
    assert torch.equal(other.output, 2 * other.arguments["x"] + 5.0)


def test_a_batch_by_position_names_the_samples_in_the_order_of_their_rows() -> None:
    waiting = Waiting()
    waiting.run(None, 1.0, samples=2, by_position=True)
    waiting.executor.calls.clear()
    assert waiting.run(None, 1.0, samples=2, by_position=True) == [2]
    assert waiting.executor.calls == [[0.0, 1.0, 0.0, 1.0]]


def test_what_cannot_tell_samples_apart_runs_alone_and_gives_what_it_gives_alone() -> None:
    waiting = Waiting()
    waiting.run(None, None)
    for _ in range(4):
        waiting.run(None, "odd")
    assert waiting.run(None, "odd", "odd") == [1, 2]


@pytest.mark.parametrize("axes", [None, BatchAxes({("x",): "list", ("y",): 0}, {(): 0})], ids=["guessed", "learned"])
def test_samples_are_even_where_the_items_of_their_lists_are_as_long(axes: BatchAxes | None) -> None:
    def of(*lengths: int) -> dict[str, Any]:
        return {"x": [torch.zeros(length, 3) for length in lengths], "y": torch.zeros(len(lengths), 2)}

    merger = Merger(axes)
    assert merger.is_even([of(4, 4), of(4, 4)])
    assert not merger.is_even([of(4, 4), of(4, 5)])
    several = {"z": (torch.zeros(2, 3), torch.zeros(2, 5)), **of(4, 4)}
    assert merger.is_even([several, several]), "tensors that are no samples may have any shape"


def test_what_was_seen_of_ever_new_kinds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engine.batching.mixing.VALUES_KEPT", 4)
    waiting = Waiting()
    for value in range(1, 20):
        waiting.batches.mixing.note_right(waiting.forwards(None, float(value)))
    assert len(waiting.batches.mixing._is_right) <= 4
