"""Outputs are compared bit for bit, and what stands for nothing in a tiny pipeline is filled."""

import numpy as np
import torch
from PIL import Image

from benchmarks.coverage.checkpoint import fill_zeros
from benchmarks.coverage.unsplit import all_finite, compare, output_leaves

NUMBERS = torch.tensor([1.0, float("nan")])


def test_equal_outputs_are_the_same_also_where_they_are_not_numbers() -> None:
    truth = output_leaves({"images": [NUMBERS, np.float32(2)], "nsfw": None, "word": "a"})
    assert compare(output_leaves({"images": [NUMBERS.clone(), np.float32(2)], "nsfw": None, "word": "a"}), truth) == (
        "same",
        "",
    )
    assert not all_finite(truth)


def test_a_last_bit_is_a_difference() -> None:
    changed = torch.nextafter(torch.ones(3), torch.tensor(2.0))
    assert compare([changed, torch.ones(1)], [torch.ones(3), torch.ones(1)]) == (
        "differs",
        "1 of 2 tensors differ, by up to 1.19e-07",
    )


def test_other_shapes_kinds_and_numbers_of_values_are_a_difference() -> None:
    assert compare([torch.ones(2)], [torch.ones(3)])[0] == "differs"
    assert compare([torch.ones(2).half()], [torch.ones(2)])[0] == "differs"
    assert compare([], [torch.ones(2)])[0] == "differs"
    assert compare(["a"], ["b"])[0] == "differs"


def test_an_output_without_numbers_has_nothing_to_compare() -> None:
    assert compare(["a", None], ["a", None])[0] == "nothing"


def test_pictures_are_their_pixels_and_objects_their_numbers() -> None:
    class Mesh:
        def __init__(self) -> None:
            self.vertices, self.name = torch.ones(2), "cube"

    pixels, kind, vertices = output_leaves([Image.new("RGB", (2, 1), "white"), Mesh()])
    assert pixels.tolist() == [[[255] * 3] * 2]
    assert kind == "object Mesh"
    assert vertices.tolist() == [1, 1]


def test_zeros_that_would_hide_an_input_are_filled_alike_each_time() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for each in (first, second):
        torch.nn.init.zeros_(each.bias)
        fill_zeros(each)
    assert first.bias.any()
    assert torch.equal(first.bias, second.bias)
    assert not torch.equal(first.weight, second.weight), "other numbers stay"
