"""Random numbers on a simulated device, as test_draws.py asks in a process of its own.

Its generators are strict, as CUDA's: it refuses a generator of the CPU, and has a global one of its own.
"""

import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from deployments.engine.engine import Engine
from deployments.engine.executor import LocalExecutor
from deployments.engine.fiber import Fiber
from deployments.messages import STAGES, StageName
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.remote_calls import answer_call, apply_answer, component_call
from deployments.stage_pipeline.roles import PipelineLayout
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, Result, call_directly
from deployments.tensors.draws import DrawWhereTheGeneratorIs, draws_of_call
from deployments.tensors.packing import pack, unpack
from tests.support import simulated_accelerator

DEVICE = "npu"  # a device of torch only once it is installed
STEPS = 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def in_halves(device: torch.device) -> torch.Tensor:
    return torch.full((4, 3), 0.5, device=device)


Draw = Callable[[torch.device], torch.Tensor]

# What pipelines, schedulers and modules draw with a request's generator: by functions that make a tensor, that read
# one, and by methods that fill one.
DRAWS: dict[str, Draw] = {
    "randn": lambda device: torch.randn(3, 4, generator=generator(), device=device),
    "randn in half precision": lambda device: torch.randn(8, generator=generator(), device=device, dtype=torch.float16),
    "randn by the device's name": lambda device: torch.randn(3, generator=generator(), device=str(device)),
    "rand": lambda device: torch.rand(1, device=device, generator=generator()),
    "randint": lambda device: torch.randint(0, 99, (7,), device=device, generator=generator()),
    "randperm": lambda device: torch.randperm(9, generator=generator(), device=device),
    "normal of tensors": lambda device: torch.normal(in_halves(device), in_halves(device), generator=generator()),
    "normal of numbers": lambda device: torch.normal(0.0, 1.0, (3, 2), generator=generator(), device=device),
    "multinomial": lambda device: torch.multinomial(in_halves(device), 2, generator=generator()),
    "bernoulli": lambda device: torch.bernoulli(in_halves(device), generator=generator()),
    "poisson": lambda device: torch.poisson(in_halves(device), generator=generator()),
    "normal_": lambda device: in_halves(device).normal_(generator=generator()),
    "uniform_": lambda device: in_halves(device).uniform_(-1, 1, generator=generator()),
    "random_": lambda device: in_halves(device).random_(0, 99, generator=generator()),
    "exponential_": lambda device: in_halves(device).exponential_(generator=generator()),
    "bernoulli_": lambda device: in_halves(device).bernoulli_(0.3, generator=generator()),
    "cauchy_": lambda device: in_halves(device).cauchy_(generator=generator()),
    "log_normal_": lambda device: in_halves(device).log_normal_(generator=generator()),
    "geometric_": lambda device: in_halves(device).geometric_(0.4, generator=generator()),
    "a part of a tensor": lambda device: in_halves(device)[1:3].normal_(generator=generator()),
    "out": lambda device: torch.randn(4, 3, generator=generator(), out=in_halves(device)),
    "nn.init": lambda device: torch.nn.init.normal_(in_halves(device), generator=generator()),
    "nn.init by position": lambda device: torch.nn.init.uniform_(in_halves(device), 0.0, 1.0, generator()),
}


def refusal(draw: Draw) -> str:
    """What the device says to the draw as it stands; empty where it makes no difference."""
    try:
        draw(torch.device(DEVICE))
    except RuntimeError as error:
        return str(error)
    return ""


def is_drawn_alike(draw: Draw) -> bool:
    """Whether the numbers are the CPU's, and on the device."""
    on_cpu = draw(torch.device("cpu"))
    with DrawWhereTheGeneratorIs():
        on_device = draw(torch.device(DEVICE))
    return on_device.device.type == DEVICE and torch.equal(on_device.to("cpu"), on_cpu)


class Denoiser(torch.nn.Module):
    """Draws in its forward too, where it is handed a generator."""

    def forward(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        if generator is None:
            return latents * 0.1
        return latents * 0.1 + torch.rand(latents.shape, device=latents.device, generator=generator)


class Autoencoder(torch.nn.Module):
    """Samples with the generator that it is handed."""

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return picture

    def encode(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return picture + torch.randn(picture.shape, device=picture.device, generator=generator)

    def decode(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return latents


class Drawing(DiffusionPipeline):
    """Draws at each step: with its own generator on the device, and with the device's global one."""

    def __init__(self, denoiser: Any, vae: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.vae = vae

    def __call__(self, hands_on: bool = False, generator: Any = None, output_type: str = "pt") -> torch.Tensor:
        device = self._execution_device
        latents = self.vae.encode(torch.zeros(1, 4, device=device), generator)
        for _ in range(STEPS):
            latents = latents + self.denoiser(latents, generator=generator if hands_on else None)
            latents = latents + torch.randn(1, 4, generator=generator, device=device) + torch.randn_like(latents)
        return latents


def stage_on(device: torch.device) -> StagePipeline:
    models: dict[str, type[torch.nn.Module]] = {"denoiser": Denoiser, "vae": Autoencoder}
    stages_of = {"denoiser": frozenset[StageName]({"denoiser"}), "vae": frozenset[StageName]({"encoder", "vae"})}
    layout = PipelineLayout(Path("."), Drawing, dict(models), models, stages_of)
    return StagePipeline(Drawing(Denoiser(), Autoencoder()), layout, STAGES, device, torch.float32)


def run_all(engine: Engine, stage: StagePipeline, seeds: list[int], **arguments: Any) -> list[list[float]]:
    """The outputs of requests that take turns in the engine's thread."""

    def run(seed: int) -> list[float]:
        fiber = Fiber(str(seed), deterministic=True)

        def forward(module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
            return engine.run(fiber, module, component, context, args, kwargs, merge_key=None)

        engine.begin(fiber)
        try:
            session = DenoiseSession(stage, arguments, seed, None, run_denoiser=forward)
            outcome = engine.call(fiber, session.run)
        finally:
            engine.end(fiber)
        assert isinstance(outcome, Result)
        return outcome.output.to("cpu").flatten().tolist()

    with ThreadPoolExecutor(len(seeds)) as threads:
        return list(threads.map(run, seeds))


def states_come_back() -> bool:
    """What is drawn after the states were sent as a message and set again: the same as the first time."""
    session = DenoiseSession(stage_on(torch.device(DEVICE)), {}, 3, None)
    torch.manual_seed(3)
    states = unpack(pack(session.random_states()), session.device)
    drawn = [torch.randn(3, device=DEVICE).to("cpu")]
    session.set_random_states(states)
    drawn.append(torch.randn(3, device=DEVICE).to("cpu"))
    return torch.equal(*drawn)


def remote_call_is_alike() -> bool:
    """A call that samples in another stage draws as one here, and leaves the caller's generators as one here."""
    stage, drawn = stage_on(torch.device(DEVICE)), []
    for is_remote in (False, True):
        torch.manual_seed(3)
        mine = generator()
        args, kwargs = (torch.zeros(1, 4, device=DEVICE), mine), {}
        if is_remote:
            call = component_call(DenoiseSession(stage, {}, 3, None), "vae", "encode", args, kwargs)
            torch.manual_seed(99)  # another process
            output = apply_answer(answer_call(stage, call), args, kwargs, stage.device)
        else:
            with draws_of_call(args, kwargs):
                output = stage.pipeline.vae.encode(*args)
        after = torch.randn(3, generator=mine), torch.rand(3, device=DEVICE).to("cpu")
        drawn.append((output.to("cpu"), *after))
    return all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    simulated_accelerator.install(DEVICE)
    stage, engine = stage_on(torch.device(DEVICE)), Engine(executor=LocalExecutor(call_directly))
    seeds = [1, 2, 3]
    report = {
        "refused": {name: refusal(draw) for name, draw in DRAWS.items()},
        "alike": {name: is_drawn_alike(draw) for name, draw in DRAWS.items()},
        "alone": [run_all(engine, stage, [seed])[0] for seed in seeds],
        "together": run_all(engine, stage, seeds),
        "handed on": run_all(engine, stage, seeds, hands_on=True),
        "handed on alone": [run_all(engine, stage, [seed], hands_on=True)[0] for seed in seeds],
        "modes left": torch._C._len_torch_function_stack(),
        "in the engine's thread": engine.call(Fiber("last"), torch._C._len_torch_function_stack),
        "states come back": states_come_back(),
        "remote call": remote_call_is_alike(),
        "without a generator": call_directly(
            Denoiser(), "denoiser", None, (torch.ones(1, 4, device=DEVICE),), {}
        ).shape,
    }
    engine.close()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
