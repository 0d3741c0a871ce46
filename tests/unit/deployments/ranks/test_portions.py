"""A forward's samples are told apart along the axes that the engine has learned, or not at all."""

from typing import Any

import pytest
import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.ranks.portions import NoPortionsError, joined, portion_sizes, portions

AXES = BatchAxes(
    {("x",): 0, ("texts",): "list", ("rows",): 1, ("time",): "same", ("more", "y"): 0, ("ids",): "same"},
    {(0,): 0, (1,): "list", ("sample",): 0},
)


def forward(num_samples: int) -> dict[str, Any]:
    return {
        "x": torch.arange(num_samples * 6.0).view(num_samples, 2, 3),
        "texts": [torch.full((index + 1, 2), float(index)) for index in range(num_samples)],
        "rows": torch.arange(num_samples * 8.0).view(2, num_samples * 2, 2),
        "time": torch.arange(float(num_samples)),
        "more": {"y": torch.arange(float(num_samples)).view(num_samples, 1), "scale": 2.0},
        "ids": torch.zeros(5, 3),
        "return_dict": False,
    }


@pytest.mark.parametrize(
    ("num_samples", "num_portions", "sizes"), [(4, 2, [2, 2]), (3, 2, [2, 1]), (1, 2, [1]), (5, 4, [2, 1, 1, 1])]
)
def test_portions_are_as_even_as_can_be(num_samples: int, num_portions: int, sizes: list[int]) -> None:
    assert portion_sizes(num_samples, num_portions) == sizes


@pytest.mark.parametrize("sizes", [[2, 1], [1, 1, 1], [3]])
def test_portions_of_the_arguments_are_those_of_the_samples(sizes: list[int]) -> None:
    whole = forward(3)
    parts = portions(whole, AXES, sizes)
    assert [len(part["x"]) for part in parts] == sizes
    assert [len(part["texts"]) for part in parts] == sizes
    assert torch.equal(torch.cat([part["x"] for part in parts]), whole["x"])
    assert torch.equal(torch.cat([part["rows"] for part in parts], 1), whole["rows"])
    assert torch.equal(torch.cat([part["time"] for part in parts]), whole["time"]), "one for each sample"
    assert torch.equal(torch.cat([part["more"]["y"] for part in parts]), whole["more"]["y"])
    assert all(part["ids"] is whole["ids"] and part["more"]["scale"] == 2.0 for part in parts)


def test_outputs_of_portions_are_joined_in_their_order() -> None:
    a, b = torch.ones(2, 3), torch.zeros(1, 3)
    output = joined([(a, [1, 2], None), (b, [3], None)], AXES)
    assert torch.equal(output[0], torch.cat([a, b]))
    assert output[1:] == ([1, 2, 3], None)


@pytest.mark.parametrize(
    ("changed", "axes"),
    [
        ({"x": torch.zeros(4, 2)}, AXES),  # four rows for three samples
        ({"bad": torch.zeros(3, 3)}, BatchAxes({**AXES.arguments, ("bad",): "bad"}, {})),
    ],
)
def test_samples_that_cannot_be_told_apart_stay_together(changed: dict[str, Any], axes: BatchAxes) -> None:
    with pytest.raises(NoPortionsError):
        portions({**forward(3), **changed}, axes, [2, 1])


@pytest.mark.parametrize("outputs", [[torch.ones(2), torch.zeros(2)], [{"a": 1}, {"a": 2}]])
def test_outputs_without_a_batch_axis_that_differ_are_not_joined(outputs: list[Any]) -> None:
    with pytest.raises(NoPortionsError):
        joined(outputs, AXES)
