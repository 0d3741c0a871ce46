"""Adapters over layers in few bits: alone the bytes of PEFT's own forward, in a batch each sample with its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from deployments.adapters.forward import prepare, why_not
from deployments.weights.quantization.nvfp4 import NVFP4Linear, quantized_tensors
from tests.support.adapted_layers import LONE, Net, numbers, told_of, truth_of, with_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

WIDTHS = (64, 128)  # whole blocks of each kind
DTYPE = torch.bfloat16
Make = Callable[[int, int], torch.nn.Module]


def by_torchao(config: str) -> Make:
    def make(inputs: int, outputs: int) -> torch.nn.Module:
        from torchao import quantization

        layer = torch.nn.Sequential(torch.nn.Linear(inputs, outputs)).to(DTYPE)
        quantization.quantize_(layer, getattr(quantization, config)())
        return layer[0]

    return make


def in_nvfp4(inputs: int, outputs: int) -> torch.nn.Module:
    layer = NVFP4Linear(inputs, outputs, bias=False)
    for name, tensor in quantized_tensors(torch.randn(outputs, inputs).to(DTYPE) / 8).items():
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor)
    return layer


def in_nf4(inputs: int, outputs: int) -> torch.nn.Module:
    """As `deployments.weights.precision.nf4` has it, by the CPU's code of bitsandbytes."""
    from bitsandbytes.nn import Linear4bit

    settings = {"compute_dtype": DTYPE, "compress_statistics": True, "quant_type": "nf4"}
    layer: torch.nn.Module = Linear4bit(inputs, outputs, **settings)
    return layer.to("cpu")


def in_gguf(kind: str) -> Make:
    def make(inputs: int, outputs: int) -> torch.nn.Module:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        layer = GGUFLinear(inputs, outputs, bias=True, compute_dtype=DTYPE)
        quantised = gguf.GGMLQuantizationType[kind]
        weight = torch.from_numpy(gguf.quants.quantize((torch.randn(outputs, inputs) / 8).numpy(), quantised))
        layer.weight = GGUFParameter(weight, quant_type=quantised)
        return layer

    return make


KINDS: dict[str, tuple[str, Make]] = {  # with the library that each needs
    "int8": ("torchao", by_torchao("Int8WeightOnlyConfig")),
    "int8_dynamic": ("torchao", by_torchao("Int8DynamicActivationInt8WeightConfig")),
    "fp8": ("torchao", by_torchao("Float8WeightOnlyConfig")),
    "nvfp4": ("torch", in_nvfp4),
    "nf4": ("bitsandbytes", in_nf4),
    "gguf_q8_0": ("gguf", in_gguf("Q8_0")),
    "gguf_q4_0": ("gguf", in_gguf("Q4_0")),
}


def layers(kind: str) -> Net:
    needs, make = KINDS[kind]
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    torch.manual_seed(0)
    net = Net(make(*WIDTHS), make(*reversed(WIDTHS)))
    net.is_loaded_in_4bit = kind == "nf4"  # as diffusers and transformers say it, for PEFT to choose its layers by
    return net


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_alone_it_is_what_peft_does_and_in_a_batch_each_sample_has_its_own(kind: str) -> None:
    net = with_adapters(layers(kind), dtype=None)
    assert why_not(net) is None
    x = numbers(5, WIDTHS[0])(6).to(DTYPE)
    plain, alone = layers(kind)(x), [truth_of(net, x, scales) for scales in LONE]
    prepare(net)
    for scales, truth in zip(LONE, alone, strict=True):
        assert torch.equal(told_of(net, x, (6, scales)), truth)
        assert not torch.equal(truth, plain)
    assert torch.equal(told_of(net, x, (6, {"a": 0.0})), plain)
    mixed = told_of(net, x, (2, {}), (2, LONE[0]), (2, LONE[3]))
    for rows, truth in zip((slice(2), slice(2, 4), slice(4, 6)), (plain, alone[0], alone[3]), strict=True):
        torch.testing.assert_close(mixed[rows], truth[rows], rtol=1e-2, atol=1e-2)
