"""What crosses a replica boundary comes back as it was: numbers, strides, classes; and nothing else may cross."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from deployments.messages import Packed
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import MissingTensor, Opaque

CPU = torch.device("cpu")
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def through_a_message(value: Any) -> Any:
    """Packed, sent as JSON and read-only bytes, and unpacked."""
    packed = pack(value)
    buffers = tuple(np.frombuffer(buffer.tobytes(), np.uint8) for buffer in packed.buffers)
    return unpack(Packed(json.loads(json.dumps(packed.tree)), buffers), CPU)


def same(a: Any, b: Any) -> bool:
    """Equal in class, structure and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, Image.Image):
        return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def bits(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # a single number keeps whatever stride it has
    return flat.view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Dense tensors of any dtype and order of dimensions, slices of others, empty ones and single numbers."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 3
    tensor = numbers.to(dtype)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if tensor.ndim and draw(st.booleans()):
        tensor = tensor[..., ::2]
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(["f4", "f8", "i8", "u1", "?", "<U3"]))
    return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype).T


PICTURES = st.builds(
    lambda mode, width, height: Image.new(mode, (width, height), 7),
    st.sampled_from(["RGB", "L", "RGBA"]),
    st.integers(1, 5),
    st.integers(1, 5),
)
LEAVES = st.one_of(
    tensors(),
    arrays(),
    PICTURES,
    st.builds(lambda seed: torch.Generator().manual_seed(seed), st.integers(0, 2**32)),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(max_size=20),
    st.sampled_from(DTYPES),
    st.builds(torch.Size, st.lists(st.integers(0, 9), max_size=3)),
    st.builds(slice, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
    st.builds(MissingTensor, st.tuples(st.integers(0, 9)), st.sampled_from(DTYPES), st.booleans()),
    st.builds(Opaque, st.text(max_size=5)),
)
TREES = st.recursive(
    LEAVES,
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(TREES)
def test_every_tree_comes_back_as_it_was(tree: Any) -> None:
    assert same(tree, through_a_message(tree))


@settings(deadline=None)
@given(tensors())
def test_a_dense_tensor_keeps_the_order_of_its_memory(tensor: torch.Tensor) -> None:
    dense = torch.empty_like(tensor).copy_(tensor)  # keeps the order of dimensions, closes the gaps
    back = through_a_message(dense)
    moved = [side for side in range(dense.ndim) if dense.shape[side] > 1]
    if dense.numel():
        assert [back.stride(side) for side in moved] == [dense.stride(side) for side in moved]


def test_a_single_number_out_of_a_longer_row_is_packed() -> None:
    one = torch.arange(2.0)[::2]
    assert one.stride() == (2,)
    assert torch.equal(through_a_message(one), torch.zeros(1))


def test_channels_last_stays_channels_last() -> None:
    picture = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    assert through_a_message(picture).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "value",
    [
        Transformer2DModelOutput(sample=torch.ones(2, 3)),
        BaseModelOutput(last_hidden_state=torch.ones(2, 3), hidden_states=(torch.zeros(1), torch.ones(1))),
        BatchEncoding({"input_ids": torch.arange(4)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_output_of_a_library_comes_back_as_its_own_class(value: Any) -> None:
    back = through_a_message(value)
    assert type(back) is type(value)
    assert list(back.keys()) == list(value.keys())
    assert all(same(back[name], value[name]) for name in value)


def test_a_posterior_distribution_draws_the_same_sample_on_the_other_side() -> None:
    posterior = DiagonalGaussianDistribution(torch.randn(1, 8, 2, 2))
    back = through_a_message(posterior)
    samples = [each.sample(torch.Generator().manual_seed(3)) for each in (posterior, back)]
    assert torch.equal(*samples)


def test_an_unpacked_tensor_may_be_written_and_the_message_stays() -> None:
    packed = pack(torch.zeros(3))
    unpack(packed, CPU).add_(1)
    assert torch.equal(unpack(packed, CPU), torch.zeros(3))


class Stranger:
    pass


@dataclasses.dataclass
class StrangeOutput:
    sample: int = 1


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (Stranger(), "Stranger cannot cross a replica boundary"),
        ([{"deep": (Stranger(),)}], "Stranger cannot cross a replica boundary"),
        (StrangeOutput(), "StrangeOutput cannot cross a replica boundary"),
        (len, "cannot cross a replica boundary"),
        (torch.nn.Linear(1, 1), "Linear cannot cross a replica boundary"),
        (torch.empty(1, device="meta"), "without numbers"),
        (np.array([Stranger()]), "an array of Python objects"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_message_may_carry_is_refused(value: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        pack(value)


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "subprocess:Popen",
        "builtins:eval",
        "tests.unit.deployments.tensors.test_packing:Stranger",
        "diffusers.utils.logging:get_logger",
        "diffusers.pipelines.pipeline_utils:DiffusionPipeline",
        "transformers.modeling_utils:PreTrainedModel",
        "diffusersevil:Output",
    ],
)
def test_a_message_that_names_other_code_is_refused(path: str) -> None:
    message = Packed({"kind": "library", "class": path, "names": [], "items": []})
    with pytest.raises(TypeError, match=f"names the class {path}"):
        unpack(message, CPU)


def test_a_message_is_a_copy_whatever_container_the_numbers_lie_in() -> None:
    tensor, array = torch.arange(6.0).reshape(2, 3), np.arange(4)
    values = {
        "plain": tensor,
        "strided": tensor.t(),
        "a part": tensor[:, 1],
        "list": [tensor, [tensor]],
        "tuple": (tensor, array),
        "output": BaseModelOutput(last_hidden_state=tensor),
        "encoding": BatchEncoding({"ids": tensor}),
        "distribution": DiagonalGaussianDistribution(torch.ones(1, 2, 2, 2)),
        "array": array,
        "number": array[1],
        "one": tensor.sum(),
    }
    packed = pack(values)
    before = [buffer.tobytes() for buffer in packed.buffers]
    tensor += 1
    array += 1
    values["list"].append(1)  # type: ignore[attr-defined]
    values["distribution"].mean.add_(1)  # type: ignore[attr-defined]
    assert [buffer.tobytes() for buffer in packed.buffers] == before
    assert len(unpack(packed, CPU)["list"]) == 2
