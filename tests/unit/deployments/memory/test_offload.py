"""Groups come for their forwards and leave; what cannot be offloaded is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.hooks.group_offloading import ModuleGroup
from torch.overrides import TorchFunctionMode
from transformers import T5Config, T5EncoderModel

from deployments.devices import Device, select_device
from deployments.memory.args import OffloadArgs
from deployments.memory.offload import install_offload, names_to_blocks, refuse_offload
from deployments.memory.turns import Turns
from deployments.modules import AccelerationError, StageModules
from tests.support.tiny_models.autoencoders import kl_autoencoder

CPU = select_device("cpu")


def stage(device: Device = CPU, **components: Any) -> StageModules:
    return StageModules(("encoder",), components, (), (), device)


def offload(component: Any, device: Device = CPU, turns: Turns | None = None, **settings: Any) -> list[str]:
    args = OffloadArgs.model_validate(settings)
    return install_offload(
        stage(device, it=component), {"it": args, "elsewhere": args}, turns or Turns(CPU.torch_device)
    )


class Present(TorchFunctionMode):
    """Bytes of the tensors that are on the device now; in it, a layer that computes without its own weights raises."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, int] = {}
        self.most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.embedding):
            weights = [each for each in args if isinstance(each, torch.nn.Parameter)]
            assert weights
            assert all(id(weight) in self.tensors for weight in weights), "a layer computes without its weights"
            self.most = max(self.most, sum(self.tensors.values()))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Present:
    there = Present()
    onload, leave = ModuleGroup.onload_, ModuleGroup.offload_

    def tensors(group: Any) -> list[torch.Tensor]:
        inside = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        return [*inside, *group.parameters, *group.buffers]

    def come(group: Any) -> None:
        onload(group)
        there.tensors.update({id(t): t.nbytes for t in tensors(group)})

    def go(group: Any) -> None:
        leave(group)
        for tensor in tensors(group):
            there.tensors.pop(id(tensor), None)

    monkeypatch.setattr(ModuleGroup, "onload_", come)
    monkeypatch.setattr(ModuleGroup, "offload_", go)
    return there


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=4, num_heads=2)
    return T5EncoderModel(config).eval()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("settings", [{}, {"blocks_per_group": 2}, {"level": "leaf"}], ids=str)
def test_each_layer_finds_its_weights_and_never_are_all_there_at_a_time(settings: Any, present: Present) -> None:
    """A T5, whose blocks are two levels down, and whose embedding has two names."""
    torch.manual_seed(0)
    module = t5()
    words = torch.arange(6)[None]
    with torch.no_grad():
        expected = module(words).last_hidden_state
        offload(module, kind="group", **settings)
        assert not present.tensors
        for _ in range(2):
            with present:
                assert torch.equal(module(words).last_hidden_state, expected)
    assert not present.tensors
    assert 0 < present.most < sum(parameter.nbytes for parameter in module.parameters())


def test_blocks_are_found_wherever_they_are() -> None:
    assert names_to_blocks(t5()) == ["encoder"]
    assert names_to_blocks(kl_autoencoder()) is None  # its class names them
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1)
    assert names_to_blocks(flux) is None


def test_what_no_component_is_called_is_refused_by_name() -> None:
    args = {"transformer_3": OffloadArgs(kind="model"), "vae": OffloadArgs(kind="model")}
    with pytest.raises(AccelerationError, match="offload names transformer_3; the models are vae, transformer"):
        refuse_offload(args, {"vae": object, "transformer": object})


def test_what_an_accelerator_without_streams_cannot_do_is_refused_by_name() -> None:
    npu = Device("npu", torch.device("meta"))
    with pytest.raises(AccelerationError, match=r"offload\.it: stream is on, and meta has no streams; .*cuda, xpu"):
        offload(t5(), npu, kind="group", stream="on")


def test_weights_that_their_quantiser_keeps_on_the_device_are_refused() -> None:
    module = t5()
    config = SimpleNamespace(quant_method="QuantizationMethod.BITS_AND_BYTES bitsandbytes_4bit")
    module.hf_quantizer = SimpleNamespace(quantization_config=config)  # type: ignore[assignment]
    for kind in ("group", "model"):
        with pytest.raises(AccelerationError, match=r"offload\.it: its weights are quantised by .*bitsandbytes"):
            offload(module, kind=kind)


def test_a_class_without_group_offloading_is_refused_by_name() -> None:
    module = kl_autoencoder()
    module._supports_group_offloading = False
    with pytest.raises(
        AccelerationError, match=r"offload\.it: AutoencoderKL does not support kind: group; kind: model"
    ):
        offload(module, kind="group")


def test_the_log_says_what_is_offloaded_and_that_a_cpu_gains_nothing() -> None:
    assert offload(t5(), kind="group", blocks_per_group=2) == [
        "offload: it: groups of 2 blocks",
        "offload: this replica runs on cpu, whose weights are on the host anyway",
    ]
    assert offload(t5(), kind="model")[0] == "offload: it: on the device for its calls"
    assert install_offload(stage(it=t5()), {}, Turns(CPU.torch_device)) == []
