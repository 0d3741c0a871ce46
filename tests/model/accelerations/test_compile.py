"""Compiled forwards: which they are, what they cost whom, and what happens where nothing can be compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from deployments.accelerations import compile as compile_row
from deployments.accelerations.compile import check_compiler, modes_of
from deployments.accelerations.compiled_forwards import CompiledForwards, structure_of
from deployments.engine.executor import call_module
from deployments.engine.fiber import Fiber
from deployments.modules import AccelerationError
from tests.support.compiled_denoiser import (
    WIDTH,
    Compiler,
    Denoiser,
    Served,
    arguments_of,
    check_under_fibers,
    engine_of,
)
from tests.support.stage_modules import CPU


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(compile_row, "BACKEND", made)
    monkeypatch.setattr(compile_row, "check_compiler", lambda device, backend: None)
    return made


@pytest.mark.parametrize("mode", ["regional", "whole"])
def test_the_second_request_of_a_structure_compiles_it_for_batches_of_any_size(mode: str, compiler: Compiler) -> None:
    served, plain = Served(mode, compiler), Denoiser()
    for _ in range(3):  # steps of one request
        served.make("first")
    assert compiler.graphs == 0
    served.make("second")
    alone = compiler.graphs
    assert alone == 1  # the blocks of one class share what is compiled
    served.make("second", samples=2)
    batches = compiler.graphs
    assert batches == 2
    for samples in (3, 5, 8, 1):
        with torch.no_grad():
            torch.testing.assert_close(served.make("third", samples), plain(**arguments_of(samples)))
    assert compiler.graphs == batches
    assert served.forwards.compilation_s > 0


def test_a_lone_request_of_an_odd_size_pays_for_no_compilation(compiler: Compiler) -> None:
    served = Served("regional", compiler)
    for request in ("first", "second"):
        served.make(request)
    before = compiler.graphs
    for _ in range(4):
        served.make("odd", tokens=7)
    assert compiler.graphs == before
    with served.forwards.warming_up():  # one is enough before the replica takes requests
        served.make("warm-up", tokens=9)
    assert compiler.graphs > before


def test_what_hangs_on_one_request_is_never_compiled(compiler: Compiler) -> None:
    rewired = [False]
    served = Served("whole", compiler, is_rewired=lambda _: rewired[0])
    served.make("first")
    enter, key = served.forwards.as_they_are(None, ())
    assert enter is not None
    assert key not in (None, ())  # its costs are learned
    with enter():  # a deterministic request
        served.make("second")
    rewired[0] = True
    served.make("third")
    rewired[0] = False
    with torch.enable_grad():
        arguments = arguments_of()
        served.forwards(served.denoiser, "transformer", None, (), arguments)
    assert compiler.graphs == 0
    served.make("fourth")
    assert compiler.graphs == 1


def test_without_compile_nothing_surrounds_a_forward() -> None:
    forwards = CompiledForwards({}, call_module)
    assert forwards.as_they_are(None, ()) == (None, ())
    assert forwards.settings == ""


def test_what_cannot_be_compiled_runs_as_it_is_and_is_told_once(
    compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.error = ValueError("no kernel for this")
    served, plain = Served("regional", compiler), Denoiser()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for request in ("first", "second", "third"):
            assert torch.equal(served.make(request), plain(**arguments_of()))
    assert compiler.graphs == 1
    [told] = [record.getMessage() for record in caplog.records if record.name.startswith("deployments")]
    assert "run as they are" in told
    assert "no kernel for this" in told


def test_a_fault_of_the_forward_itself_is_raised_and_not_held_against_the_compiler(compiler: Compiler) -> None:
    served = Served("whole", compiler)
    wrong = torch.zeros(1, 4, WIDTH + 1)
    for request in ("first", "second", "third"):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
            served.make(request, hidden_states=wrong)
        assert type(raised.value) is RuntimeError
    assert served.forwards._refused == set()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_compiler_that_runs_out_of_memory_says_what_a_forward_would(kind: Any, compiler: Compiler) -> None:
    compiler.error = kind("CUDA driver error: out of memory, tried to allocate 2 GiB")
    served = Served("regional", compiler)
    served.make("first")
    for _ in range(2):  # smaller batches of the structure are still tried
        with pytest.raises(kind, match="2 GiB") as raised:
            served.make("second", samples=2)
        assert not isinstance(raised.value, BackendCompilerFailed)


class Branching(Denoiser):
    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(hidden_states, timestep)


def test_places_that_break_a_graph_are_told(compiler: Compiler, caplog: pytest.LogCaptureFixture) -> None:
    served = Served("whole", compiler, Branching())
    with caplog.at_level(logging.WARNING):
        served.make("first")
        served.make("second")
    assert "1 places in transformer run as they are" in caplog.text


def test_structures_are_equal_whatever_the_number_of_samples() -> None:
    axes = {("x",): 1, ("t",): "same", ("images",): "list"}
    one = {"x": torch.zeros(3, 1, 4), "t": torch.tensor(0.5), "images": [torch.zeros(2, 2)], "return_dict": False}
    two = {"x": torch.zeros(3, 2, 4), "t": torch.ones(2), "images": [torch.zeros(2, 2)] * 2, "return_dict": False}
    assert structure_of(one, axes) == structure_of(two, axes)
    assert structure_of(one, axes) != structure_of(one | {"x": torch.zeros(4, 1, 4)}, axes)
    assert structure_of(one, axes) != structure_of(one | {"images": [torch.zeros(2, 3)]}, axes)


@pytest.mark.parametrize(
    ("asked", "modes"),
    [
        ("regional", {"transformer": "regional", "transformer_2": "regional"}),
        ({"transformer_2": "whole"}, {"transformer_2": "whole"}),
    ],
)
def test_one_mode_is_that_of_all_denoisers_and_each_may_have_its_own(asked: Any, modes: dict[str, str]) -> None:
    assert modes_of(asked, ("transformer", "transformer_2")) == modes


def test_a_component_that_is_no_denoiser_is_refused_by_name() -> None:
    with pytest.raises(AccelerationError, match="compile names vae; what can be compiled: transformer"):
        modes_of({"vae": "whole"}, ("transformer",))


def test_a_denoiser_without_repeated_blocks_is_refused(compiler: Compiler) -> None:
    class Alone(Denoiser):
        _repeated_blocks = None

    for denoiser in (Alone(), torch.nn.Linear(2, 2)):
        with pytest.raises(AccelerationError, match=r"transformer: regional is not possible, .* allowed are off and"):
            Served("regional", compiler, denoiser)
    assert "whole in transformer (1 x Alone)" in Served("whole", compiler, Alone()).line


@pytest.mark.filterwarnings("ignore")  # of torch's own, when inductor is imported
def test_a_machine_without_a_compiler_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    told = r"nothing can be compiled on cpu, which needs a C\+\+ compiler .* \(No working C\+\+ compiler found"
    with pytest.raises(AccelerationError, match=told):
        check_compiler(CPU, "inductor")


def test_what_compiling_takes_is_no_measure_of_a_forward(compiler: Compiler) -> None:
    served = Served("regional", compiler)
    for request in ("first", "second"):
        served.forwards.note(request, "transformer", arguments_of())
    engine, fiber = engine_of(served), Fiber("second")
    for _ in range(2):
        engine.call(fiber, lambda: engine.run(fiber, served.denoiser, "transformer", None, (), arguments_of()))
    [costs] = engine.costs.table().values()
    engine.close()
    assert served.forwards.compilation_s > 5 * fiber.seconds
    assert costs[1] < served.forwards.compilation_s / 5


def test_dynamo_works_in_the_engines_thread_while_fibers_fail_at_any_depth(compiler: Compiler) -> None:
    check_under_fibers(compiler)
    assert compiler.graphs == 2
