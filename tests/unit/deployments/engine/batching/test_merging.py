"""Merging and splitting as a property: for any shapes, axes and counts each caller gets its own numbers back."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.batching.axes import Axis, BatchAxes
from deployments.engine.batching.merging import CannotMergeError, Merger

sizes = st.integers(1, 3)
counts = st.lists(st.integers(1, 3), min_size=2, max_size=4)


@dataclass(frozen=True)
class Shape:
    """Of one argument: its axes beside the batch, where the batch is among them, and rows for each sample."""

    others: tuple[int, ...]
    axis: int
    rows: int

    def tensor(self, num_samples: int, seed: int) -> torch.Tensor:
        shape = (*self.others[: self.axis], self.rows * num_samples, *self.others[self.axis :])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    others = tuple(draw(st.lists(sizes, max_size=3)))
    return Shape(others, draw(st.integers(0, len(others))), draw(sizes))


@given(st.lists(shapes(), min_size=1, max_size=4), counts)
def test_what_was_merged_by_learned_axes_splits_into_what_it_was(each: list[Shape], counts: list[int]) -> None:
    axes: dict[Any, Axis] = {(f"argument_{i}",): shape.axis for i, shape in enumerate(each)}
    # An output is read by its own path: here the outputs are the arguments.
    merger = Merger(BatchAxes(axes, {(i,): shape.axis for i, shape in enumerate(each)}))
    forwards = [
        {f"argument_{i}": shape.tensor(count, seed) for i, shape in enumerate(each)}
        for seed, count in enumerate(counts)
    ]
    merged = merger.merge(forwards, counts)
    portions = merger.split(tuple(merged.values()), counts)
    for portion, forward in zip(portions, forwards, strict=True):
        assert all(map(torch.equal, portion, forward.values()))


@given(st.lists(sizes, min_size=0, max_size=3), counts)
def test_what_was_merged_by_guessed_axes_splits_into_what_it_was(others: list[int], counts: list[int]) -> None:
    merger = Merger(None)
    forwards = [{"hidden_states": torch.randn(count, *others), "timestep": torch.tensor([0.5])} for count in counts]
    merged = merger.merge(forwards, counts)
    assert merged["hidden_states"].shape[0] == sum(counts)
    portions = merger.split(merged["hidden_states"], counts)
    for portion, forward in zip(portions, forwards, strict=True):
        assert torch.equal(portion, forward["hidden_states"])


@given(counts)
def test_lists_of_samples_are_joined_and_given_back_in_order(counts: list[int]) -> None:
    merger = Merger(BatchAxes({("x",): "list"}, {(): "list"}))
    forwards = [{"x": [torch.tensor([seed, i]) for i in range(count)]} for seed, count in enumerate(counts)]
    merged = merger.merge(forwards, counts)["x"]
    for portion, forward in zip(merger.split(merged, counts), forwards, strict=True):
        assert all(map(torch.equal, portion, forward["x"]))


@given(counts, st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_each_sample_gets_the_time_step_of_its_own_forward(counts: list[int], steps: list[float]) -> None:
    forwards = [{"t": torch.tensor(step)} for step, _ in zip(steps, counts, strict=False)]
    merged = Merger(BatchAxes({("t",): "same"}, {})).merge(forwards, counts)["t"]
    assert torch.equal(merged, torch.cat([f["t"].expand(n) for f, n in zip(forwards, counts, strict=False)]))


@given(shapes(), shapes(), st.integers(1, 3), st.integers(1, 3))
def test_structures_are_equal_only_where_the_merge_is_possible(a: Shape, b: Shape, m: int, n: int) -> None:
    merger = Merger(BatchAxes({("x",): a.axis}, {(): a.axis}))
    one, other = {"x": a.tensor(m, 0)}, {"x": b.tensor(n, 1)}
    if b.axis != a.axis or len(b.others) != len(a.others):
        return  # another number of axes, which the learned axis was not learned for
    is_same = merger.structure(one, m) == merger.structure(other, n)
    assert is_same == (a.others == b.others and a.rows == b.rows)
    if is_same:
        merged = merger.merge([one, other], [m, n])["x"]
        assert all(map(torch.equal, merger.split(merged, [m, n]), (one["x"], other["x"])))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": torch.zeros(1, 2)}, {"x": torch.zeros(1, 2, dtype=torch.float16)}),
        ({"x": torch.zeros(1, 2), "scale": 1.0}, {"x": torch.zeros(1, 2), "scale": 2.0}),
        ({"x": torch.zeros(1, 2), "mask": None}, {"x": torch.zeros(1, 2), "mask": torch.zeros(1, 2)}),
        ({"x": torch.zeros(1, 2), "more": {"a": 1}}, {"x": torch.zeros(1, 2), "more": {"b": 1}}),
        ({"x": torch.zeros(1, 2)}, {"x": torch.zeros(1, 2), "y": torch.zeros(1, 2)}),
    ],
    ids=["dtype", "constant", "missing", "names", "number of arguments"],
)
def test_forwards_that_differ_otherwise_have_different_structures(one: Any, other: Any) -> None:
    for merger in (Merger(None), Merger(BatchAxes({("x",): 0}, {(): 0}))):
        assert merger.structure(one, 1) != merger.structure(other, 1)


def test_an_object_with_state_and_an_argument_without_a_rule_are_never_merged() -> None:
    with pytest.raises(CannotMergeError, match="a Cache, the state of one caller"):
        Merger(None).structure({"cache": Cache()}, 1)
    with pytest.raises(CannotMergeError, match="follows no rule"):
        Merger(BatchAxes({("x",): "bad"}, {})).structure({"x": torch.zeros(1)}, 1)


class Cache:
    """An object that no rule knows."""


def test_a_shared_argument_that_differs_is_refused() -> None:
    merger = Merger(BatchAxes({("x",): 0, ("ids",): "same"}, {(): 0}))
    forwards = [{"x": torch.zeros(1, 2), "ids": torch.tensor([i, 0])} for i in range(2)]
    with pytest.raises(CannotMergeError, match=r"ids.* differs between the forwards"):
        merger.merge(forwards, [1, 1])


def test_an_output_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(CannotMergeError, match="follows no rule"):
        Merger(None).split(torch.zeros(5, 2), [1, 1])
    with pytest.raises(CannotMergeError, match="is a Cache"):
        Merger(None).split(Cache(), [1, 1])


def test_only_equal_arguments_that_are_neither_latents_nor_time_steps_are_guessed_to_be_shared() -> None:
    ids, timestep = torch.arange(4), torch.tensor([1.0])
    forwards = [
        {"hidden_states": torch.ones(1, 2), "timestep": timestep, "ids": ids, "text": torch.zeros(1, 3)}
        for _ in range(2)
    ]
    nothing, narrow, equal = Merger(None).shared_guesses(forwards)
    assert (nothing, narrow, equal) == (frozenset(), {("ids",)}, {("ids",), ("text",)})
    assert Merger(BatchAxes({}, {})).shared_guesses(forwards) == [frozenset()]
    assert Merger(None).shared_guesses([{"x": torch.zeros(1)}] * 2) == [frozenset()], "each guess once"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"timestep": torch.zeros(7), "hidden_states": torch.zeros(3, 2)}, 3),
        ({"x": [torch.zeros(2)] * 4}, 4),
        ({"anything": torch.zeros(2, 2)}, 2),
        ({"scale": 1.0}, 1),
    ],
)
def test_samples_are_counted_in_the_latents(arguments: Any, expected: int) -> None:
    assert Merger(None).num_samples(arguments) == expected


# --- by position ---


@given(st.lists(shapes(), min_size=1, max_size=3), st.integers(1, 3), st.integers(2, 4))
def test_what_was_merged_by_position_splits_into_what_it_was(each: list[Shape], samples: int, forwards: int) -> None:
    axes: dict[Any, Axis] = {(f"argument_{i}",): shape.axis for i, shape in enumerate(each)}
    merger = Merger(BatchAxes(axes, {(i,): shape.axis for i, shape in enumerate(each)}), by_position=True)
    made = [{f"argument_{i}": s.tensor(samples, seed) for i, s in enumerate(each)} for seed in range(forwards)]
    counts = [samples] * forwards
    portions = merger.split(tuple(merger.merge(made, counts).values()), counts)
    for portion, forward in zip(portions, made, strict=True):
        assert all(map(torch.equal, portion, forward.values()))


def test_by_position_the_samples_lie_as_a_pipeline_stacks_several_pictures() -> None:
    merger = Merger(BatchAxes({("x",): 0, ("names",): "list"}, {(): "list"}), by_position=True)
    forwards = [
        {"x": torch.tensor([10 * f, 10 * f + 0.5, 10 * f + 1, 10 * f + 1.5]), "names": [f"without {f}", f"with {f}"]}
        for f in (1, 2)
    ]
    merged = merger.merge(forwards, [2, 2])
    assert merged["x"].tolist() == [10, 10.5, 20, 20.5, 11, 11.5, 21, 21.5], "two rows of each sample stay together"
    assert merged["names"] == ["without 1", "without 2", "with 1", "with 2"]
    assert merger.split(merged["names"], [2, 2]) == [forward["names"] for forward in forwards]


def test_by_position_time_steps_that_differ_go_with_their_samples() -> None:
    merger = Merger(None, by_position=True)
    forwards = [{"timestep": torch.tensor(t), "hidden_states": torch.zeros(2, 3)} for t in (1.0, 5.0)]
    assert merger.merge(forwards, [2, 2])["timestep"].tolist() == [1, 5, 1, 5]


# --- lists of samples ---


def z_image(side: int, words: int, samples: int = 1) -> dict[str, Any]:
    return {
        "x": [torch.zeros(16, 1, side, side) for _ in range(samples)],
        "t": torch.zeros(samples),
        "cap_feats": [torch.zeros(words, 8) for _ in range(samples)],
    }


LISTS = BatchAxes({("x",): "list", ("t",): 0, ("cap_feats",): "list"}, {(): "list"})


@pytest.mark.parametrize("axes", [LISTS, None], ids=["learned", "guessed"])
def test_lists_of_latents_of_other_sizes_do_not_merge_and_texts_of_about_one_length_do(axes: BatchAxes | None) -> None:
    merger = Merger(axes)

    def structure(side: int, words: int, samples: int = 1) -> Any:
        return merger.structure(z_image(side, words, samples), samples)

    assert structure(64, 20) == structure(64, 31) == structure(64, 31, samples=2)
    assert structure(64, 20) != structure(192, 20), "all would be padded to the largest"
    assert structure(64, 20) != structure(64, 40), "and so would the texts"


def test_a_list_whose_samples_differ_merges_with_one_alike() -> None:
    merger = Merger(LISTS)
    with_guidance = [z_image(64, 20), z_image(64, 90)]
    both = {name: [*with_guidance[0][name], *with_guidance[1][name]] for name in ("x", "cap_feats")}
    assert merger.structure(both, 2) == merger.structure(both, 2)
    assert merger.structure(both, 2) != merger.structure({**both, "cap_feats": both["cap_feats"][::-1]}, 2)
