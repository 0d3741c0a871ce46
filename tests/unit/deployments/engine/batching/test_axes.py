"""The batch is the axis that doubles between a call for one sample and the same call for two."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.batching.axes import BatchAxes, axes_of_calls, has_batch_axis, num_batch_axes

zeros = torch.zeros


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_the_axis_that_doubles_is_found_wherever_it_is(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    doubled = [2 * n if i == axis else n for i, n in enumerate(shape)]
    axes = axes_of_calls(({"x": zeros(shape)}, zeros(shape)), ({"x": zeros(doubled)}, zeros(doubled)))
    assert axes == BatchAxes({("x",): axis}, {(): axis})


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (zeros(3), zeros(3), {("x",): "same"}),
        (zeros(2, 3), zeros(4, 6), {("x",): "bad"}),
        (zeros(2), zeros(5), {("x",): "bad"}),
        ([zeros(2)], [zeros(2), zeros(2)], {("x",): "list"}),
        ([zeros(2)], [zeros(2)] * 3, {("x",): "bad"}),
        ((zeros(1), zeros(3)), (zeros(2), zeros(3)), {("x", 0): 0, ("x", 1): "same"}),
        ({"a": zeros(1)}, {"a": zeros(2)}, {("x", "a"): 0}),
        ({"a": zeros(1)}, {"b": zeros(1)}, {("x",): "bad"}),
        (None, zeros(2), {("x",): "bad"}),
        (1.0, 2.0, {}),
    ],
    ids=["same", "two axes", "no double", "list", "list of three", "tuple", "names", "other names", "kinds", "numbers"],
)
def test_what_follows_no_rule_is_bad(one: Any, two: Any, expected: dict[Any, Any]) -> None:
    assert axes_of_calls(({"x": one}, None), ({"x": two}, None)).arguments == expected


def test_more_arguments_with_a_batch_make_the_better_way_and_an_output_needs_one() -> None:
    few = {"a": BatchAxes({("x",): 0, ("y",): "same"}, {(): 0})}
    many = {"a": BatchAxes({("x",): 0, ("y",): "list"}, {(): "same"}), "b": BatchAxes({("z",): 1}, {})}
    assert (num_batch_axes(few), num_batch_axes(many), num_batch_axes({})) == (1, 3, 0)
    assert has_batch_axis(few["a"])
    assert not has_batch_axis(many["a"])
