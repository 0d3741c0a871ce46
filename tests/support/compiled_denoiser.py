"""A denoiser of two blocks in its two forms, and its forwards in the engine's thread under fibers that fail.

    python -m tests.support.compiled_denoiser BACKEND

checks them in a process of its own, which a C stack that lies wrong would end.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin

from deployments.accelerations import compile as compile_row
from deployments.accelerations.compile import install
from deployments.accelerations.compiled_forwards import CompiledForwards
from deployments.engine.engine import Engine
from deployments.engine.executor import LocalExecutor, call_module
from deployments.engine.fiber import Fiber
from deployments.modules import StageModules
from env_config.variables import EnvConfig
from tests.support.stage_modules import CPU

ROOT = Path(__file__).parents[2]
NUM_REQUESTS, NUM_STEPS = 4, 4
SAID = "compiled under fibers"
WIDTH = 8
AXES = {("hidden_states",): 0, ("timestep",): 0}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mix(torch.nn.functional.silu(hidden_states) * scale)
        return mixed


class Denoiser(ModelMixin, ConfigMixin):
    """Two blocks, which diffusers would compile."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = timestep.reshape(-1, 1, 1).cos()
        for block in self.blocks:
            hidden_states = block(hidden_states, scale)
        return hidden_states


class Compiler:
    """A backend of torch.compile that counts the graphs that it is given, and compiles none of them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.graphs = 0
        self.error = error

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        if self.error is not None:
            raise self.error
        return graph.forward


class Served:
    """Denoisers with forms of their own, and what makes their forwards."""

    def __init__(self, mode: Any, compiler: Any, denoiser: torch.nn.Module | None = None, **forwards: Any) -> None:
        self.denoiser = denoiser or Denoiser()
        modules = StageModules(("denoiser",), {"transformer": self.denoiser}, ("transformer",), (), CPU,
                               compile={"transformer": mode})  # fmt: skip
        self.line = install(modules, EnvConfig())
        self.compiler = compiler
        self.forwards = CompiledForwards(modules.switches, call_module, lambda _: AXES, **forwards)

    def make(self, request: str, samples: int = 1, tokens: int = 4, **changed: Any) -> torch.Tensor:
        arguments = arguments_of(samples, tokens) | changed
        self.forwards.note(request, "transformer", arguments)
        with torch.no_grad():
            output: torch.Tensor = self.forwards(self.denoiser, "transformer", None, (), arguments)
        return output


def arguments_of(samples: int = 1, tokens: int = 4) -> dict[str, torch.Tensor]:
    numbers = torch.linspace(-1, 1, samples * tokens * WIDTH).reshape(samples, tokens, WIDTH)
    return {"hidden_states": numbers, "timestep": torch.linspace(0.1, 0.9, samples)}


def assert_compiles_under_fibers(backend: str) -> None:
    command = [sys.executable, "-m", "tests.support.compiled_denoiser", backend]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=1200, check=False)
    assert SAID in ran.stdout, ran.stderr[-3000:]


def check_under_fibers(compiler: Any) -> None:
    """Requests whose fibers raise errors of torch at many depths while their forwards are compiled."""
    served, plain = Served("whole", compiler), Denoiser()
    engine = engine_of(served, max_wait_s=0.05)
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        outputs = list(threads.map(partial(make_request, engine, served), range(NUM_REQUESTS)))
    assert engine.statistics.merged > 0
    assert served.forwards.compilation_s > 0
    assert not served.forwards._refused
    with torch.no_grad():
        for output in outputs:
            torch.testing.assert_close(output, plain(**arguments_of()))
    engine.close()


def engine_of(served: Served, **settings: Any) -> Engine:
    executor, forwards = LocalExecutor(served.forwards), served.forwards
    return Engine(executor=executor, merging="always", compilation_s=lambda: forwards.compilation_s, **settings)


def make_request(engine: Engine, served: Served, index: int) -> torch.Tensor:
    fiber = Fiber(str(index))

    def work() -> Any:
        for _ in range(NUM_STEPS):
            arguments = arguments_of()
            served.forwards.note(str(index), "transformer", arguments)
            output = engine.run(fiber, served.denoiser, "transformer", None, (), arguments)
            with suppress(RuntimeError):
                fail_at(40 * index)
        return output

    engine.begin(fiber)
    try:
        output: torch.Tensor = engine.call(fiber, work)
        return output
    finally:
        engine.end(fiber)


def fail_at(depth: int) -> torch.Tensor:
    """torch walks the C stack when it makes the error."""
    return fail_at(depth - 1) if depth else torch.ones(2) @ torch.ones(3)


if __name__ == "__main__":
    compile_row.BACKEND = sys.argv[1]
    check_under_fibers(None)
    print(SAID)
