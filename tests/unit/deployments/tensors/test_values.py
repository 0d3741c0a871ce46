"""Trees of values are walked in order, described without their numbers and filled with what shows itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deployments.messages import Packed
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import (
    LARGEST_KEPT,
    Anything,
    MissingTensor,
    Opaque,
    copied,
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
    assert torch.equal(described["ids"], ids)
    assert described["large"] == MissingTensor((LARGEST_KEPT + 1,), torch.int64, on_stage_device=False)


def digest(packed: Packed) -> str:
    """Of the structure and the bytes."""
    return repr((packed.tree, [buffer.tobytes() for buffer in packed.buffers]))


def mutable_tree() -> tuple[Any, list[Any]]:
    """A value of every container and kind of leaf, and those of its leaves that can be changed in place."""
    shared, picture = torch.zeros(2), Image.new("RGB", (2, 2))
    leaves: list[Any] = [
        torch.zeros(2),
        torch.arange(3),
        np.zeros(2),
        picture,
        torch.Generator().manual_seed(1),
        shared,
    ]
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 2, 1, 1))
    output = Transformer2DModelOutput(sample=leaves[0])
    tree = {
        "output": output,
        "row": (leaves[1], [leaves[2], picture]),
        "posterior": posterior,
        "twice": [shared, shared],
    }
    return {**tree, "generator": leaves[4], "nothing": None}, [*leaves, posterior.mean]


def changed_in_place(leaves: list[Any]) -> None:
    for leaf in leaves:
        if isinstance(leaf, torch.Generator):
            torch.rand(3, generator=leaf)
        elif isinstance(leaf, Image.Image):
            leaf.putpixel((0, 0), (9, 9, 9))
        else:
            leaf += 1


def test_a_copy_keeps_its_numbers_whatever_is_changed_in_the_value_in_whatever_container() -> None:
    tree, leaves_ = mutable_tree()
    copy = copied(tree)
    before = digest(pack(copy))
    changed_in_place(leaves_)
    tree["row"][1].append(1)
    assert digest(pack(copy)) == before != digest(pack(tree))
    assert type(copy["output"]) is Transformer2DModelOutput
    assert copy["twice"][0] is copy["twice"][1], "what lies there twice stays one"


def test_what_a_receiver_changes_of_a_filled_description_changes_nothing_in_it() -> None:
    tree, leaves_ = mutable_tree()
    description = describe(tree)
    before = digest(pack(without_opaque(description)))
    changed_in_place(leaves_)
    for _ in range(2):
        changed_in_place(
            [leaf for leaf in leaves(fill(description, CPU)) if isinstance(leaf, torch.Tensor | np.ndarray)]
        )
    assert digest(pack(without_opaque(description))) == before


def test_a_tensor_that_is_sent_at_two_places_is_received_as_one() -> None:
    sent = torch.zeros(2)
    received = unpack(pack([sent, {"again": sent}, torch.zeros(2)]), CPU)
    received[0].add_(1)
    assert torch.equal(received[1]["again"], torch.ones(2))
    assert torch.equal(received[2], torch.zeros(2))


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


def test_a_placeholder_of_an_opaque_object_is_a_leaf_as_the_object_was() -> None:
    received = with_anything([Opaque("DynamicCache"), 1])
    assert copied(received)[0] is received[0]
    assert describe(received) == [Opaque("Anything"), 1]
