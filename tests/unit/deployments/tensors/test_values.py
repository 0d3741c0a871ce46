"""Trees of values are walked in order, described without their numbers and filled with what shows itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.tensors.values import (
    LARGEST_KEPT,
    Anything,
    MissingTensor,
    Opaque,
    describe,
    fill,
    fill_meta,
    has_nan,
    is_meta,
    leaves,
    map_values,
    same_description,
    shape_key,
    to_meta,
    with_anything,
    without_opaque,
)

CPU = torch.device("cpu")
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
TREES = st.recursive(
    TENSORS | st.integers() | st.text(max_size=3) | st.none(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


@given(TREES)
def test_mapping_by_the_identity_gives_the_same_leaves_in_order(tree: Any) -> None:
    mapped = map_values(lambda leaf: leaf, tree)
    assert [id(leaf) for leaf in leaves(mapped)] == [id(leaf) for leaf in leaves(tree)]
    assert same_description(mapped, tree)


@settings(deadline=None)
@given(TREES)
def test_a_filled_description_has_the_shapes_of_the_tree_and_describes_itself_alike(tree: Any) -> None:
    description = describe(tree)
    for filled in (fill(description, CPU), fill_meta(description)):
        assert shape_key(filled) == shape_key(tree)
    assert same_description(describe(fill(description, CPU)), description)


@given(TREES)
def test_no_number_of_a_filled_description_is_taken_for_a_true_one(tree: Any) -> None:
    floats = [
        leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel()
    ]
    assert has_nan(fill(describe(tree), CPU)) == bool(floats)
    assert not has_nan(tree)


@given(TREES)
def test_only_a_tree_with_tensors_is_meta(tree: Any) -> None:
    has_tensors = any(isinstance(leaf, torch.Tensor) for leaf in leaves(tree))
    assert is_meta(to_meta(tree)) == has_tensors
    assert not is_meta(tree)


def test_ids_and_masks_stay_in_a_description_unless_they_are_large() -> None:
    ids, large = torch.arange(5), torch.zeros(LARGEST_KEPT + 1, dtype=torch.int64)
    described = describe({"ids": ids, "large": large})
    assert described["ids"] is ids
    assert described["large"] == MissingTensor((LARGEST_KEPT + 1,), torch.int64, on_stage_device=False)


def test_an_output_of_a_model_stays_of_its_class() -> None:
    mapped = map_values(lambda leaf: leaf + 1, Transformer2DModelOutput(sample=torch.zeros(2)))
    assert isinstance(mapped, Transformer2DModelOutput)
    assert torch.equal(mapped.sample, torch.ones(2))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1], (1,)),
        ([1], [1, 1]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2), torch.ones(2)),
        (np.zeros(2), np.ones(2)),
        (MissingTensor((1,), torch.float32), MissingTensor((2,), torch.float32)),
        (1, True),
        ("a", None),
    ],
)
def test_descriptions_that_differ_are_told_apart(a: Any, b: Any) -> None:
    assert not same_description(a, b)
    assert same_description(a, a)
    assert same_description(b, b)


def test_an_object_that_stays_in_its_process_is_replaced_by_one_that_answers_everything() -> None:
    class Cache:
        pass

    sent = without_opaque({"cache": Cache(), "ids": torch.arange(2)})
    assert sent["cache"] == Opaque("Cache")
    received = with_anything(sent)
    assert isinstance(received["cache"].update(1).keys, Anything)
    assert list(received["cache"]) == []
