"""A session's copy of a pipeline reports to it, and nothing that other requests share is changed."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from deployments.errors import InvalidRequestError
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.roles import PipelineLayout
from deployments.stage_pipeline.sessions.pipeline_code import COMPONENT_CALL, PIPELINE_CODE
from deployments.stage_pipeline.sessions.session import Session

SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)


class Denoiser(torch.nn.Module):
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * 0.1


class Toy(DiffusionPipeline):
    """The least that a pipeline is: a denoiser, a scheduler, and a loop that copies the scheduler first."""

    def __init__(self, denoiser: Any, scheduler: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.scheduler = scheduler

    def check_inputs(self, steps: int) -> None:
        if steps < 1:
            raise ValueError("steps must be positive")

    def __call__(self, steps: int = 3, generator: Any = None, output_type: str = "pt") -> torch.Tensor:
        self.check_inputs(steps)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 4, 2, 2, generator=generator)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(self.denoiser(latents), timestep, latents, return_dict=False)[0]
        return latents


def stage_of(scheduler: Any) -> StagePipeline:
    layout = PipelineLayout(
        Path("."), Toy, {"denoiser": Denoiser}, {"denoiser": Denoiser}, {"denoiser": frozenset({"denoiser"})}
    )
    return StagePipeline(Toy(Denoiser(), scheduler), layout, ("denoiser",), torch.device("cpu"), torch.float32)


class Recording(Session):
    """Runs everything, and notes what it was told."""

    def __init__(self, stage: StagePipeline, arguments: dict[str, Any], seed: int = 0) -> None:
        super().__init__(stage, arguments, seed)
        self.rounds = 0
        self.forwards: list[str] = []

    def on_round(self, scheduler: Any) -> None:
        self.rounds += 1

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        self.forwards.append(component)
        return real(*args, **kwargs)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_the_session_hears_of_each_round_step_and_forward_and_the_numbers_stay(cls: Any) -> None:
    stage = stage_of(cls())
    with torch.no_grad():
        torch.manual_seed(0)
        truth = stage.pipeline(generator=torch.Generator().manual_seed(0))
    session = Recording(stage, {})
    assert torch.equal(session.call_pipeline(), truth)
    assert (session.rounds, session.steps_done, session.forwards) == (1, 3, ["denoiser"] * 3)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_the_classes_of_diffusers_and_the_shared_scheduler_are_not_touched(cls: Any) -> None:
    step, set_timesteps, shared = cls.step, cls.set_timesteps, cls()
    stage = stage_of(shared)
    before = dict(vars(shared))
    Recording(stage, {}).call_pipeline()
    assert (cls.step, cls.set_timesteps) == (step, set_timesteps)
    assert type(shared) is cls
    assert vars(shared) == before
    assert stage.pipeline.scheduler is shared


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_private_scheduler_looks_like_its_class(cls: Any) -> None:
    private = Recording(stage_of(cls()), {}).pipeline.scheduler
    assert isinstance(private, cls)
    assert private.__class__ is cls
    assert copy.deepcopy(private).__class__ is cls
    assert torch.equal(private.scale_model_input(torch.ones(1), 0), torch.ones(1)) or hasattr(cls, "scale_model_input")
    assert private.config == cls().config
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(private, method)) == inspect.signature(getattr(cls(), method))
    assert private.compatibles == cls().compatibles
    assert private.from_config(private.config).config == private.config


def test_the_class_of_private_schedulers_is_made_once() -> None:
    stage = stage_of(DDIMScheduler())
    assert type(Recording(stage, {}).pipeline.scheduler) is type(Recording(stage, {}).pipeline.scheduler)


def test_two_sessions_of_one_stage_hear_only_of_their_own_steps() -> None:
    stage = stage_of(DDIMScheduler())
    one, other = Recording(stage, {"steps": 2}), Recording(stage, {"steps": 5})
    one.call_pipeline()
    other.call_pipeline()
    assert (one.steps_done, other.steps_done) == (2, 5)


def test_a_scheduler_that_a_pipeline_makes_anew_reports_to_nobody() -> None:
    session = Recording(stage_of(DDIMScheduler()), {})
    private = session.pipeline.scheduler
    fresh = private.__class__.from_config(private.config)
    fresh.set_timesteps(2)
    fresh.step(torch.zeros(1), fresh.timesteps[0], torch.zeros(1))
    assert (session.rounds, session.steps_done) == (0, 0)


class Parent(DDIMScheduler):
    """Its child calls it, as some schedulers of diffusers do."""


class Child(Parent):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


def test_a_step_that_calls_its_parents_step_counts_once() -> None:
    Recording(stage_of(Parent()), {}).call_pipeline()
    session = Recording(stage_of(Child()), {})
    session.call_pipeline()
    assert session.steps_done == 3


def test_what_check_inputs_refuses_is_the_callers_fault() -> None:
    with pytest.raises(InvalidRequestError, match="steps must be positive"):
        Recording(stage_of(DDIMScheduler()), {"steps": 0}).call_pipeline()


def test_the_private_copy_says_where_it_runs_and_shares_the_weights() -> None:
    stage = stage_of(DDIMScheduler())
    pipeline = Recording(stage, {}).pipeline
    assert isinstance(pipeline, Toy)
    assert type(pipeline).__name__ == "Toy"
    assert pipeline._execution_device == stage.device
    assert isinstance(pipeline.denoiser, Denoiser)
    assert stage.pipeline.denoiser is not pipeline.denoiser
    assert list(pipeline.denoiser.parameters()) == list(stage.pipeline.denoiser.parameters())


def test_the_generators_of_a_request_start_at_its_seed_and_can_be_set_back() -> None:
    session = Recording(stage_of(DDIMScheduler()), {}, seed=5)
    states = session.random_states()
    first = torch.randn(2, generator=session.generator), torch.rand(2)
    session.set_random_states(states)
    assert torch.equal(torch.randn(2, generator=session.generator), first[0])
    assert torch.equal(torch.rand(2), first[1])
    assert torch.equal(first[0], torch.randn(2, generator=torch.Generator().manual_seed(5)))


def test_a_component_that_is_called_beside_others_may_call_another_one() -> None:
    session = Recording(stage_of(DDIMScheduler()), {})
    with PIPELINE_CODE:
        assert session.call_beside("denoiser", lambda: session.call_inside("denoiser", lambda: 1, (), {}), (), {}) == 1
    assert not COMPONENT_CALL.locked()
