"""Adapters come and go in compiled modules: what is compiled again is only what has new layers."""

from collections.abc import Iterator

import pytest
import torch
from diffusers.utils.peft_utils import delete_adapter_layers
from peft import LoraConfig, inject_adapter_in_model

from deployments.accelerations import compile as compile_row
from deployments.adapters.forward import applied, num_layers, prepare
from deployments.adapters.inject import eject
from tests.support.compiled_denoiser import Compiler, Denoiser, Served, arguments_of

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

RANKS = {"a": 2, "b": 5, "c": 3, "d": 8}
MODES = pytest.mark.parametrize("mode", ["regional", "whole"])


@pytest.fixture(autouse=True)
def dynamo_is_fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(compile_row, "BACKEND", made)
    monkeypatch.setattr(compile_row, "check_compiler", lambda device, backend: None)
    return made


def put_in(denoiser: torch.nn.Module, name: str) -> None:
    torch.manual_seed(RANKS[name])
    rank = RANKS[name]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["mix"], init_lora_weights=False)
    inject_adapter_in_model(config, denoiser, name)
    prepare(denoiser.requires_grad_(False).eval())


def told(served: Served, *uses: dict[str, float]) -> torch.Tensor:
    with applied(served.denoiser, [(1, scales) for scales in uses]):
        return served.make("another", len(uses))


def truth(*uses: dict[str, float]) -> torch.Tensor:
    """Of a denoiser that nothing has compiled."""
    plain = Denoiser()
    for name in RANKS:
        put_in(plain, name)
    with applied(plain, [(1, scales) for scales in uses]), torch.no_grad():
        made: torch.Tensor = plain(**arguments_of(len(uses)))
    return made


@MODES
def test_adapters_of_any_rank_and_scale_come_and_go_without_being_compiled(mode: str, compiler: Compiler) -> None:
    served = Served(mode, compiler, layers=num_layers)
    put_in(served.denoiser, "a")
    served.make("first")
    assert torch.equal(told(served, {"a": 1.0}), truth({"a": 1.0}))
    torch.testing.assert_close(told(served, {"a": 1.0}, {}), truth({"a": 1.0}, {}))
    graphs = compiler.graphs
    assert graphs > 0
    for name in ("b", "c", "d"):
        put_in(served.denoiser, name)
        for scale in (1.0, -0.5, 0.0):
            assert torch.equal(told(served, {name: scale}), truth({name: scale}))
    delete_adapter_layers(served.denoiser, "c")
    served.denoiser.peft_config.pop("c")  # type: ignore[operator, union-attr]
    uses = ({}, {"a": 0.5, "d": 1.0}, {"b": 2.0}, {"b": -1.0})
    torch.testing.assert_close(told(served, *uses), truth(*uses))
    assert torch.equal(told(served, {}), truth({}))
    assert compiler.graphs == graphs
    assert not served.forwards._refused


@MODES
def test_the_first_adapter_is_compiled_once_for_all_blocks_and_watched_as_a_first_forward(
    mode: str, compiler: Compiler
) -> None:
    served = Served(mode, compiler, layers=num_layers)
    served.make("first"), served.make("second")
    before, compiled_s = compiler.graphs, served.forwards.compilation_s
    put_in(served.denoiser, "a")
    assert torch.equal(told(served, {"a": 1.0}), truth({"a": 1.0}))
    assert compiler.graphs == 2 * before
    assert served.forwards.compilation_s > compiled_s, "what it took is no measure of a forward"


@MODES
def test_the_last_adapter_goes_and_the_next_one_comes_without_being_compiled(mode: str, compiler: Compiler) -> None:
    served = Served(mode, compiler, layers=num_layers)
    put_in(served.denoiser, "a")
    served.make("first")
    told(served, {"a": 1.0})
    graphs = compiler.graphs
    eject(served.denoiser, "a", keeps_layers=True)
    assert torch.equal(told(served, {}), truth({}))
    put_in(served.denoiser, "b")
    assert torch.equal(told(served, {"b": 0.5}), truth({"b": 0.5}))
    assert compiler.graphs == graphs
    assert not served.forwards._refused
