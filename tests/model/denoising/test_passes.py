"""The guidance passes that a pipeline makes one after the other run as one batch, whatever it does between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from diffusers.models.cache_utils import CacheMixin

from deployments.denoising.passes import GuidancePassesOfRequest
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.errors import CannotResumeError
from deployments.messages import Checkpoint, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs, GuidancePasses
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stages import denoise
from deployments.stages.denoise import course_of
from tests.support.further import all_but
from tests.support.toy_pipelines import SEED, Made, Toy, ToyDenoiser, ToyStages, same

STEPS = 4
DEVIATION = 1e-6


class Guided(Toy):
    """The others change how the two passes of a step are made, or what becomes of them."""

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for step, timestep in enumerate(self.scheduler.timesteps):
            noise = self.noise(step, latents, timestep, words)
            latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return latents

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        return guided(self.transformer(latents, timestep, words), self.transformer(latents, timestep, -words))


def guided(with_words: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    return without + 3.0 * (with_words - without)


class TakesParts(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)[..., :2].to(torch.float64).float()
        without = self.transformer(latents, timestep, -words)[:, :2]
        return guided(with_words, without).repeat(1, 2)


class GivesADefaultToOne(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words, cache=None, writes=False)
        return guided(with_words, self.transformer(latents, timestep, -words))


class InThreePasses(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words, without, other = (self.transformer(latents, timestep, words * scale) for scale in (1.0, -1.0, 0.5))
        return guided(with_words, without) + 0.1 * other


class GuidedFromTheSecondStep(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        return guided(with_words, self.transformer(latents, timestep, -words)) if step > 0 else with_words


class GuidedAtFirst(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        return guided(with_words, self.transformer(latents, timestep, -words)) if step < 2 else with_words


class NeedsNumbersBetween(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        return guided(with_words, self.transformer(latents + 0.1 * with_words, timestep, -words))


class GivesTheFirstToTheSecond(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        return guided(with_words, self.transformer(with_words, timestep, -words))


class WritesIntoWhatItGave(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        given = latents.clone()
        with_words = self.transformer(given, timestep, words)
        given += 1.0
        return guided(with_words, self.transformer(given, timestep, -words))


class WritesIntoWhatItGaveLater(Guided):
    """So that the first step does not show it."""

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        given = latents.clone()
        with_words = self.transformer(given, timestep, words)
        if step == 2:
            given += 1.0
        return guided(with_words, self.transformer(given, timestep, -words))


class CacheIsWritten(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        cache = {"seen": torch.zeros_like(latents)}
        with_words = self.transformer(latents, timestep, words, cache=cache, writes=True)
        return guided(with_words, self.transformer(latents, timestep, -words, cache=cache))


class KeepsThem(Guided):
    """Outputs outlive their steps, so that no checkpoint can be gone on from."""

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        without = self.transformer(latents, timestep, -words)
        kept = [with_words, *(self.__dict__.get("kept", []) if step else [])]
        self.__dict__["kept"] = kept
        return guided(with_words + 0.1 * kept[-1], without)


class InTheNamesOfPasses(Guided):
    """As pipelines of diffusers that may be cached."""

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with self.transformer.cache_context("cond"):
            with_words = self.transformer(latents, timestep, words)
        with self.transformer.cache_context("uncond"):
            without = self.transformer(latents, timestep, -words)
        return guided(with_words, without)


class NeverUsesTheFirst(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        self.transformer(latents, timestep, words)
        return self.transformer(latents, timestep, -words) * 1.0


class WritesIntoItsParts(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        part, halves = with_words[:, :2], with_words.chunk(2, dim=-1)
        without = self.transformer(latents, timestep, -words)
        with_words[:, :1] = 0.5
        with_words *= 2.0
        with_words.sub_(0.1)
        torch.add(without, 0.1, out=without)
        return guided(with_words, without) + torch.cat([part, halves[1]], dim=-1)


class RescalesByDeviations(Guided):
    """As `guidance_rescale` and CFG-Zero* do, with numbers of both on the host."""

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        without = self.transformer(latents, timestep, -words)
        scale = float((with_words * without).sum() / without.square().sum())
        made = guided(with_words, without * scale)
        return made * (with_words.std(dim=-1, keepdim=True) / made.std(dim=-1, keepdim=True))


class ReadsTheFirstOnTheHost(Guided):
    """As a callback that is given a copy of it."""

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        seen = torch.from_numpy(with_words.numpy()) - copy.deepcopy(with_words)
        return guided(with_words, self.transformer(latents + seen, timestep, -words))


class HooksTheSecond(Guided):
    """As perturbed guidance does."""

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        handle = self.transformer.first.register_forward_hook(lambda module, args, output: 0.5 * output)
        without = self.transformer(latents, timestep, words)
        handle.remove()
        return guided(with_words, without)


class HooksTheFirst(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        handle = self.transformer.first.register_forward_hook(lambda module, args, output: 0.5 * output)
        with_words = self.transformer(latents, timestep, words)
        handle.remove()
        return guided(with_words, self.transformer(latents, timestep, words))


class HasWordsOfTwoLengths(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words.expand(2, -1)).mean(dim=0, keepdim=True)
        return guided(with_words, self.transformer(latents, timestep, -words))


class GuidedByTurns(Guided):
    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        return guided(with_words, self.transformer(latents, timestep, -words)) if step % 2 == 0 else with_words


class CallsAnEncoderBetween(Guided):
    """Which another process holds."""

    def noise(self, step: int, latents: torch.Tensor, timestep: Any, words: torch.Tensor) -> torch.Tensor:
        with_words = self.transformer(latents, timestep, words)
        return guided(with_words, self.transformer(latents, timestep, -self.text_encoder(latents)[-1]))


class Cacheable(ToyDenoiser, CacheMixin):
    """As the transformers of diffusers that may be cached."""


class Mixes(ToyDenoiser):
    """A wrong merge is planted: samples of a batch change each other, by as little as Cosmos' do."""

    def forward(
        self, latents: torch.Tensor, timestep: Any, words: torch.Tensor, cache: Any = None, writes: bool = False
    ) -> torch.Tensor:
        made = super().forward(latents, timestep, words, cache, writes)
        return made + 4e-3 * (made.mean(0, keepdim=True) - made)


# Of the forwards of a request, and of the turns of the device that made them, once the merge is known to be right.
COUNTS: dict[type[Toy], tuple[int, int]] = {
    Guided: (8, 5),
    InThreePasses: (12, 6),
    TakesParts: (8, 5),
    GivesADefaultToOne: (8, 5),
    GuidedFromTheSecondStep: (7, 6),  # which shows that another pass follows, as the third that it may wait
    GuidedAtFirst: (6, 5),
    NeedsNumbersBetween: (8, 8),
    GivesTheFirstToTheSecond: (8, 8),
    WritesIntoWhatItGave: (8, 8),
    InTheNamesOfPasses: (8, 5),
    NeverUsesTheFirst: (8, 5),
    KeepsThem: (8, 5),
    CacheIsWritten: (8, 8),
    WritesIntoItsParts: (8, 5),
    RescalesByDeviations: (8, 5),
    ReadsTheFirstOnTheHost: (8, 8),
    HooksTheSecond: (8, 8),
    HooksTheFirst: (8, 8),
    HasWordsOfTwoLengths: (8, 8),
    GuidedByTurns: (6, 6),
}
NOT_RESUMED = (KeepsThem, CacheIsWritten)  # later steps need what earlier ones have kept
CORE = (Guided, InThreePasses, GuidedAtFirst, NeedsNumbersBetween)
MakeStages = Callable[..., ToyStages]


@pytest.fixture
def make_stages(tmp_path: Path) -> Iterator[MakeStages]:
    made: list[ToyStages] = []

    def make(pipeline_class: type[Toy], passes: GuidancePasses = "together", **settings: Any) -> ToyStages:
        args = DenoisingArgs(checkpoint_every=1, guidance_passes=passes, **settings.pop("args", {}))
        made.append(ToyStages(pipeline_class, tmp_path, args=args, deterministic=False, **settings))
        return made[-1]

    yield make
    for stages in made:
        stages.close()


def counted(stages: ToyStages, checkpoint: Checkpoint | None = None) -> tuple[Made, int, int]:
    """What was made, the forwards and the turns of the device."""
    statistics = stages.denoiser.engine.statistics
    forwards, batches = statistics.forwards, statistics.batches
    made = stages.make(checkpoint)
    return made, statistics.forwards - forwards, statistics.batches - batches


def resumed(stages: ToyStages, checkpoint: Checkpoint) -> Made:
    """In a denoiser that has made nothing before."""
    stages.close()
    stages.denoiser = stages.new_denoiser()
    return stages.make(checkpoint)


def resumed_or_begun_again(stages: ToyStages, checkpoint: Checkpoint) -> Made:
    """As the application does."""
    try:
        return resumed(stages, checkpoint)
    except CannotResumeError:
        return stages.make()


def assert_close(made: Made, truth: list[torch.Tensor]) -> None:
    for each, true in zip(made.output, truth, strict=True):
        assert float((each - true).abs().max()) <= DEVIATION * float(true.abs().max())


@pytest.mark.parametrize("pipeline_class", all_but(CORE, COUNTS), ids=lambda each: each.__name__)
def test_passes_share_a_batch_where_no_numbers_are_needed_between_them_and_a_resume_changes_no_bit(
    pipeline_class: type[Toy], make_stages: MakeStages
) -> None:
    stages = make_stages(pipeline_class, denoiser=Cacheable)
    truth = stages.truth()
    first = stages.make()
    again, *counts = counted(stages)
    assert_close(again, truth)
    assert tuple(counts) == COUNTS[pipeline_class]
    assert same(again.output, first.output), "nothing hangs on what was made before"
    assert len(again.checkpoints) == STEPS - 1
    for checkpoint in again.checkpoints if pipeline_class not in NOT_RESUMED else ():
        assert same(resumed(stages, checkpoint).output, first.output)


@pytest.mark.parametrize("pipeline_class", all_but(CORE[:1], COUNTS), ids=lambda each: each.__name__)
def test_apart_a_request_has_the_bytes_of_its_pipeline(pipeline_class: type[Toy], make_stages: MakeStages) -> None:
    stages = make_stages(pipeline_class, "apart", denoiser=Cacheable)
    assert same(stages.make().output, stages.truth())
    assert stages.denoiser.engine.statistics.passes_together == 0


def test_what_is_written_later_into_what_a_waiting_pass_was_given_begins_the_request_again_with_passes_apart(
    make_stages: MakeStages, caplog: pytest.LogCaptureFixture
) -> None:
    stages = make_stages(WritesIntoWhatItGaveLater)
    truth = stages.truth()
    made = stages.make()
    assert same(made.output, truth)
    assert "made apart: the pipeline writes into what it has given to a guidance pass" in caplog.text
    again, forwards, batches = counted(stages)
    assert same(again.output, truth)
    assert forwards == batches == 8, "it is remembered"
    for checkpoint in made.checkpoints:  # of both goes, as far as those of the first had left
        assert same(resumed_or_begun_again(stages, checkpoint).output, truth)
    assert same(resumed(stages, made.checkpoints[-1]).output, truth), "of the second go: nothing is begun again"


def test_requests_are_remembered_for_their_passes_by_what_decides_on_their_forwards() -> None:
    def asked(**arguments: Any) -> str:
        return course_of(GenerationRequest("id", "toy", arguments, SEED, OutputFormat("image", "png")))

    course = asked(prompt="a cat", num_inference_steps=4, guidance_interval=[0.2, 0.8], mode="late")
    for words in ("a dog, dancing", "cat", "猫"):
        assert asked(prompt=words, num_inference_steps=4, guidance_interval=[0.2, 0.8], mode="late") == course
    for other in ({"num_inference_steps": 5}, {"guidance_interval": [0.2, 0.9]}, {"mode": "early"}, {"eta": None}):
        given = {"prompt": "a cat", "num_inference_steps": 4, "guidance_interval": [0.2, 0.8], "mode": "late"} | other
        assert asked(**given) != course


class FailsInOne(ToyDenoiser):
    """At the third step of a request, in the pass with words."""

    def forward(
        self, latents: torch.Tensor, timestep: Any, words: torch.Tensor, cache: Any = None, writes: bool = False
    ) -> torch.Tensor:
        if float(torch.as_tensor(timestep).max()) < 600 and bool((words.sum(dim=-1) < 0).any()):
            raise ValueError("too few words")
        return super().forward(latents, timestep, words, cache, writes)


def test_an_error_of_one_pass_is_that_of_its_request_and_leaves_others_alone(make_stages: MakeStages) -> None:
    told = []
    for passes in ("apart", "together"):
        stages = make_stages(Guided, passes, denoiser=FailsInOne)
        for _ in range(2):
            with pytest.raises(Exception, match="too few words") as raised:
                stages.make()
            told.append((type(raised.value), str(raised.value)))
        assert stages.denoiser.engine.num_fibers == stages.denoiser.engine.num_waiting == 0
    assert len(set(told)) == 1


def test_a_call_of_another_process_between_the_passes_parts_them_not_however_long_it_takes(
    make_stages: MakeStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_slowly(stages: ToyStages, stage: Any, call: Any) -> Any:
        engine = stages.denoiser.engine  # which meanwhile makes what waits
        engine.run(Fiber("other"), torch.nn.Identity(), "other", None, (), {"input": torch.ones(1, 3)})
        return answer_call(stages.stages[stage], call)

    stages = make_stages(CallsAnEncoderBetween)
    first = stages.make()
    assert first.is_remote
    assert_close(first, stages.truth())
    assert counted(stages)[1:] == (8, 5)
    monkeypatch.setattr(ToyStages, "_ask", ask_slowly)
    stages.close()
    stages.denoiser = stages.new_denoiser()
    assert same(stages.make().output, first.output)
    slowly, forwards, batches = counted(stages)
    assert (forwards, batches) == (8 + 5, 5 + 5), "five are those of the other"
    assert same(slowly.output, first.output)
    for checkpoint in first.checkpoints:
        assert same(resumed(stages, checkpoint).output, first.output)


def test_a_pass_of_another_denoiser_between_them_leaves_passes_together() -> None:
    """As a ControlNet that is run for each of them."""
    engine, fiber, steps = Engine(guidance_passes="together", max_wait_s=0.0), Fiber("request"), [0]
    passes = GuidancePassesOfRequest(engine, fiber, torch.device("cpu"), lambda: steps[0], nullcontext)
    control, denoiser = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def made(module: Any, name: str, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = passes.forward(module, name, None, (), {"input": x}, (None, (), False, None))
        return output

    def loop() -> torch.Tensor:
        latents = torch.ones(1, 4)
        for steps[0] in range(STEPS):
            outputs = [made(denoiser, "transformer", made(control, "controlnet", latents * i) + i) for i in range(3)]
            latents = outputs[0] + outputs[1] - outputs[2]
        return latents

    def truth() -> torch.Tensor:
        latents = torch.ones(1, 4)
        for _ in range(STEPS):
            outputs = [denoiser(control(latents * i) + i) for i in range(3)]
            latents = outputs[0] + outputs[1] - outputs[2]
        return latents

    with torch.no_grad():
        torch.testing.assert_close(engine.call(fiber, loop), truth())
    engine.close()
    assert engine.statistics.forwards == 6 * STEPS
    assert engine.statistics.batches == 6 + 4 * (STEPS - 1)


class NeverLearned(dict[Any, Event]):
    """Another request of the kind has asked for the batch axes, and gets no answer."""

    def setdefault(self, kind: Any, event: Event | None = None) -> Event:
        return Event()


def test_who_waits_in_vain_for_another_to_learn_the_batch_axes_makes_its_passes_apart(
    make_stages: MakeStages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(denoise, "LEARNING_S", 0.01)
    stages = make_stages(Guided)
    monkeypatch.setattr(stages.denoiser, "encode", pytest.fail)
    monkeypatch.setattr(stages.denoiser, "_learned", NeverLearned())
    assert same(stages.make().output, stages.truth())
    assert stages.denoiser.engine.statistics.passes_together == 0
    assert "made apart: another has not learned the batch axes within 0.01 s" in caplog.text
    assert not stages.denoiser._with_passes_apart, "the next request of its kind may find the axes learned"


def test_a_wrong_merge_is_refused_by_name_and_its_passes_run_apart(
    make_stages: MakeStages, caplog: pytest.LogCaptureFixture
) -> None:
    stages = make_stages(Guided, denoiser=Mixes)
    truth = stages.truth()
    assert same(stages.make().output, truth)
    again, forwards, batches = counted(stages)
    assert same(again.output, truth)
    assert forwards == batches == 8
    assert stages.denoiser.engine.statistics.refused_structures == 1
    assert "forwards of transformer run alone: merged ones deviate" in caplog.text


def test_a_deterministic_request_makes_its_passes_apart(make_stages: MakeStages) -> None:
    stages = make_stages(Guided)
    stages.make()
    stages.deterministic = True
    made, forwards, batches = counted(stages)
    assert same(made.output, stages.truth())
    assert forwards == batches


@pytest.mark.parametrize("settings", [{}, {"guidance_passes": "together", "max_batch_tokens": 1}])
def test_a_checkpoint_of_passes_together_is_refused_where_they_are_made_apart(
    settings: dict[str, Any], make_stages: MakeStages
) -> None:
    stages = make_stages(Guided)
    made = stages.make()
    stages.args = DenoisingArgs(checkpoint_every=1, **settings)
    with pytest.raises(CannotResumeError, match="other settings"):
        resumed(stages, made.checkpoints[0])


def test_a_cache_of_diffusers_that_keeps_state_by_the_name_of_a_pass_gets_each_under_its_own(
    make_stages: MakeStages,
) -> None:
    stages = make_stages(InTheNamesOfPasses, denoiser=Cacheable)
    names: list[str] = []
    hook_on(stages.denoiser.stage.components["transformer"], names)
    made, forwards, batches = counted(stages)
    assert same(made.output, stages.truth())
    assert forwards == batches == 8
    assert names == ["cond", "uncond"] * STEPS


def hook_on(module: torch.nn.Module, names: list[str]) -> None:
    class Names(ModelHook):
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.state = StateManager(BaseState)

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            names.append(self.state.context.name)
            return args, kwargs

    HookRegistry.check_if_exists_or_initialize(module).register_hook(Names(), "names")
