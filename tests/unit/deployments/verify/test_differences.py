"""What is told of two trees of values: which tensor, how many elements, by how much, where first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image

from deployments.tensors.values import Opaque
from deployments.verify.differences import differences, largest

NUMBERS = torch.arange(6.0).reshape(2, 3)


def told(made: Any, truth: Any) -> list[str]:
    return [str(difference) for difference in differences(made, truth, "output")]


def test_equal_trees_have_no_differences() -> None:
    tree = {"images": NUMBERS, "sizes": (1, "a", None), "array": np.ones(2), "rng": torch.Generator().manual_seed(1)}
    same = {"images": NUMBERS.clone(), "sizes": (1, "a", None), "array": np.ones(2), "rng": torch.Generator()}
    same["rng"].manual_seed(1)  # type: ignore[union-attr]
    assert differences(same, tree, "output") == []
    assert largest([]) == 0.0


def test_a_difference_of_numbers_says_how_many_how_much_and_where_first() -> None:
    made = NUMBERS.clone()
    made[1, 0] += 0.5
    made[1, 2] -= 1.0
    assert told({"images": [made]}, {"images": [NUMBERS]}) == [
        "output.images[0]: 2 of 6 elements differ by at most 1.00e+00, 2.0e-01 of its largest value; "
        "first at [1, 0]: 3.5 in place of 3"
    ]
    assert largest(differences(made, NUMBERS, "x")) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "numbers",
    [
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1, 2]),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j, 3.0]),
        torch.tensor(3.0),
        np.array([1.0, 2.0], np.float16),
        Image.new("L", (2, 1), 7),
    ],
    ids=str,
)
def test_one_other_element_is_found_in_every_kind_of_numbers(numbers: Any) -> None:
    plain = torch.from_numpy(np.array(numbers)) if not isinstance(numbers, torch.Tensor) else numbers
    other = plain.clone()
    other.view(-1)[-1] = not other.view(-1)[-1] if other.dtype == torch.bool else other.view(-1)[-1] + 1
    assert differences(numbers, numbers, "x") == []
    [found] = differences(other, numbers, "x")
    assert f"1 of {plain.numel()} elements differ" in found.what
    assert found.relative is not None


def test_nan_is_equal_to_nan_and_has_no_number_of_its_own() -> None:
    broken = torch.tensor([1.0, math.nan])
    assert differences(broken.clone(), broken, "x") == []
    [found] = differences(torch.tensor([math.nan, math.nan]), broken, "x")
    assert "NaN or infinite" in found.what
    assert found.relative is None
    assert largest([found]) is None


@pytest.mark.parametrize(
    ("made", "truth", "what"),
    [
        (NUMBERS.T, NUMBERS, "float32 [3, 2] in place of float32 [2, 3]"),
        (NUMBERS.half(), NUMBERS, "float16 [2, 3] in place of float32 [2, 3]"),
        (NUMBERS, [NUMBERS], "a Tensor in place of a list"),
        ([1, 2], [1], "[0], [1] in place of [0]"),
        ({"a": 1}, {"b": 1}, ".a in place of .b"),
        (None, NUMBERS, "a NoneType in place of a Tensor"),
        ("a", "b", "'a' in place of 'b'"),
    ],
)
def test_other_shapes_types_and_words_are_told_in_words(made: Any, truth: Any, what: str) -> None:
    [found] = differences(made, truth, "x")
    assert (found.what, found.relative) == (what, None)


def test_fields_of_outputs_have_their_names_and_what_stays_in_its_process_is_left_out() -> None:
    made, truth = (Transformer2DModelOutput(sample=NUMBERS + add) for add in (1, 0))
    [found] = differences([made, Opaque("Cache")], [truth, object()], "x")
    assert found.place == "x[0].sample"
