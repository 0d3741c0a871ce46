"""One forward with adapters: alone the bytes of diffusers' and PEFT's own, in a batch each sample with its own."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers.utils.peft_utils import delete_adapter_layers
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from deployments.adapters.forward import RowsUnknownError, applied, num_layers, prepare, why_not
from tests.support.adapted_layers import LONE, Inputs, Net, numbers, told_of, truth_of, with_adapters

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

KINDS: dict[str, tuple[Callable[[], Net], Inputs]] = {
    "linear": (lambda: Net(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)), numbers(5, 6)),
    "conv1d": (lambda: Net(torch.nn.Conv1d(4, 6, 3)), numbers(4, 9)),
    "conv2d": (lambda: Net(torch.nn.Conv2d(4, 6, 3, padding=1)), numbers(4, 6, 6)),
    "conv3d": (lambda: Net(torch.nn.Conv3d(4, 6, 3)), numbers(4, 5, 5, 5)),
    "embedding": (
        lambda: Net(torch.nn.Embedding(11, 6)),
        lambda samples: torch.arange(5 * samples).reshape(samples, 5) % 11,
    ),
}


def made(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Net, Net, Inputs]:
    """A net to be told by `applied`, and the same as PEFT has it."""
    torch.manual_seed(0)
    make, inputs = KINDS[kind]
    net = with_adapters(make(), dtype=dtype)
    told, truth = copy.deepcopy(net), net
    prepare(told)
    return told, truth, lambda samples: x.to(dtype) if (x := inputs(samples)).is_floating_point() else x


def test_a_call_inside_of_another_leaves_the_outer_ones_adapters() -> None:
    told, truth, inputs = made("linear")
    x = inputs(2)
    with applied(told, [(2, {"a": 1.0})]):
        with applied(told, [(2, {"b": 1.0})]):
            told(x)
        with applied(told, [(1, {})]):  # a part of the samples, which uses none
            assert torch.equal(told(x[:1]), truth_of(truth, x[:1], {}))
        assert torch.equal(told(x), truth_of(truth, x, {"a": 1.0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_forward_has_the_bytes_of_set_adapters(kind: str, dtype: torch.dtype) -> None:
    told, truth, inputs = made(kind, dtype)
    x = inputs(2)
    for scales in LONE:
        assert torch.equal(told_of(told, x, (2, scales)), truth_of(truth, x, scales))


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_zero_and_no_adapter_give_the_bytes_of_a_module_without_any(kind: str) -> None:
    told, _, inputs = made(kind)
    torch.manual_seed(0)
    bare, x = KINDS[kind][0](), inputs(2)
    assert torch.equal(told_of(told, x, (2, {"a": 0.0})), bare(x))
    assert torch.equal(told_of(told, x, (1, {}), (1, {"b": 0.0})), bare(x))
    assert torch.equal(told(x), bare(x))


def test_a_forward_leaves_nothing_in_the_layers_of_others() -> None:
    told, _, inputs = made("linear")
    layers = [layer for layer in told.modules() if isinstance(layer, LoraLayer)]
    before = [(dict(layer.scaling), layer.active_adapters, vars(layer).keys()) for layer in layers]
    told_of(told, inputs(2), (1, {"a": 5.0}), (1, {"b": 2.0, "c": 1.0}))
    with pytest.raises(RuntimeError):
        told_of(told, torch.zeros(2, 3), (2, {"a": 5.0}))
    assert [(dict(layer.scaling), layer.active_adapters, vars(layer).keys()) for layer in layers] == before
    assert told._adapters_applied.batch is None


MIXED: list[tuple[int, dict[str, float]]] = [(1, {}), (2, {"a": 0.5}), (1, {"a": 1.0, "c": -0.3}), (2, {"b": 1.0})]


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_batch_each_sample_has_its_own_adapters_and_scales(kind: str) -> None:
    told, truth, inputs = made(kind)
    x = inputs(6)
    merged, start = told_of(told, x, *MIXED), 0
    for number, scales in MIXED:
        rows = slice(start, start + number)
        torch.testing.assert_close(merged[rows], truth_of(truth, x[rows], scales), rtol=1e-5, atol=1e-6)
        start += number


def test_rows_of_several_frames_belong_to_the_sample_that_they_lie_in() -> None:
    told, truth, _ = made("linear")
    x = numbers(3, 6)(6 * 4)  # [B * F, T, C]
    merged = told_of(told, x, *MIXED)
    torch.testing.assert_close(merged[4:12], truth_of(truth, x[4:12], {"a": 0.5}), rtol=1e-5, atol=1e-6)
    assert torch.equal(merged[:4], told(x)[:4])


@pytest.mark.parametrize(
    ("shape", "is_even"), [((7, 6), True), ((6,), True), ((1, 12, 6), True), ((12, 6), False)], ids=str
)
def test_rows_that_belong_to_nobody_known_are_refused_and_a_lone_forward_needs_no_rows(
    shape: tuple[int, ...], is_even: bool
) -> None:
    told, truth, _ = made("linear")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RowsUnknownError):
        told_of(told, x, *MIXED, is_even=is_even)
    alike = told_of(told, x, (2, {"a": 0.5}), (4, {"a": 0.5}), is_even=is_even)
    assert torch.equal(alike, truth_of(truth, x, {"a": 0.5}))


def test_an_adapter_that_was_taken_out_and_put_in_again_is_found_with_its_new_layers() -> None:
    torch.manual_seed(0)
    net = with_adapters(Net(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)), names="")
    inject_adapter_in_model(LoraConfig(target_modules=["0"], init_lora_weights=False), net, "a")
    x = numbers(5, 6)(1)
    first = told_of(net, x, (1, {"a": 1.0}))
    assert num_layers(net) == 1
    delete_adapter_layers(net, "a")
    net.peft_config.pop("a")
    with pytest.raises(ValueError, match="Net does not hold the adapters a"):
        told_of(net, x, (1, {"a": 1.0}))
    inject_adapter_in_model(LoraConfig(target_modules=["0", "1"], init_lora_weights=False), net, "a")
    again = told_of(net, x, (1, {"a": 1.0}))
    assert num_layers(net) == 2
    assert not torch.equal(first, again)
    assert torch.equal(again, truth_of(copy_without_us(net), x, {"a": 1.0}))


def copy_without_us(net: Net) -> Net:
    truth = copy.deepcopy(net)
    for layer in truth.modules():
        if isinstance(layer, LoraLayer):
            del vars(layer)["forward"]
    return truth


def test_what_no_forward_can_do_is_said_by_name() -> None:
    assert why_not(made("linear")[0]) is None
    float8 = Net(torch.nn.Linear(4, 4).to(torch.float8_e4m3fn))
    assert str(why_not(float8)).startswith("layers.0 is kept in float8_e4m3fn (as precision: layerwise does)")
    dora = Net(torch.nn.Linear(4, 4))
    inject_adapter_in_model(LoraConfig(target_modules=["0"], use_dora=True), dora)
    assert why_not(dora) == "layers.0 is a LoRA of the kind DoraLinearVariant"
    loha = Net(torch.nn.Linear(4, 4))
    inject_adapter_in_model(LoHaConfig(target_modules=["0"]), loha)
    assert why_not(loha) == "layers.0 is no LoRA but loha"
    attention = Net(torch.nn.MultiheadAttention(4, 1))
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), attention)
    assert str(why_not(attention)).startswith("layers.0 is a MultiheadAttention, whose weights PEFT exchanges")
