"""However a pipeline uses its components, the split makes the numbers of the unsplit call, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from deployments.errors import CannotResumeError
from deployments.messages import GenerationRequest, OutputFormat
from deployments.stages.encode import encode
from tests.support.toy_pipelines import SEED, WIDTH, Toy, ToyStages, same

Load = Callable[..., ToyStages]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    loaded: list[ToyStages] = []

    def load(pipeline_class: type[Toy], scheduler: Any = None) -> ToyStages:
        loaded.append(ToyStages(pipeline_class, tmp_path, scheduler))
        return loaded[-1]

    yield load
    for stages in loaded:
        stages.close()


# --- what is handed over as it was recorded ---


class ChangesWhatItWasGiven(Toy):
    """As the adapters of Stable Diffusion: a list is changed in place, and its parts too."""

    def words(self) -> torch.Tensor:
        embeddings = self.text_encoder(torch.ones(1, WIDTH))
        embeddings[0].mul_(3)
        embeddings[1] = embeddings[1] + embeddings[0]
        embeddings.append(embeddings[0])
        return sum(embeddings)  # type: ignore[return-value]


class ChangesWhatIsThereTwice(Toy):
    def words(self) -> torch.Tensor:
        once = self.text_encoder(torch.ones(1, WIDTH))
        once[0].add_(1)
        again = self.text_encoder(once[0])
        again[1].add_(once[1])
        return again[0] + again[1]


class CallsAPart(Toy):
    """As Amused quantises and MotifVideo looks at a picture."""

    def words(self) -> torch.Tensor:
        seen = self.vae.quantize(self.vae.encode(torch.ones(1, WIDTH)))
        return self.text_encoder.tower(seen) + self.text_encoder.layers[-1](seen)  # type: ignore[no-any-return]


class ReadsAParameter(Toy):
    """As AceStep: learned embeddings of what is absent."""

    def words(self) -> torch.Tensor:
        absent = self.text_encoder.absent
        assert (absent.shape, absent.dtype, absent.device) == ((1, WIDTH), torch.float32, torch.device("cpu"))
        return super().words() + absent.to(dtype=torch.float32).expand(1, WIDTH)


class ReadsAParameterOfTheDenoiser(Toy):
    def words(self) -> torch.Tensor:
        return super().words() + self.transformer.first.linear.bias


class AsksWhereParametersAre(Toy):
    """As Cosmos3Omni asks the transformer, and Flux2KleinInpaint the autoencoder."""

    def words(self) -> torch.Tensor:
        places = [next(model.parameters()).device for model in (self.text_encoder, self.transformer, self.vae)]
        places += [self.vae.device, self.vae.encoder.linear.weight.device, self.transformer.device]
        assert next(self.vae.parameters()).dtype == torch.float32
        return super().words().to(places[0]) + torch.ones(1, WIDTH, device=places[1]) + len(set(places))


class HooksALayer(Toy):
    """As JoyImageEdit takes the output of the last layer, and changes what the next layer is given."""

    def words(self) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handles = [
            self.text_encoder.layers[0].register_forward_hook(lambda module, args, output: output * 2),
            self.text_encoder.layers[-1].register_forward_hook(lambda module, args, output: seen.append(output)),
            self.text_encoder.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        ]
        words = super().words()
        for handle in handles:
            handle.remove()
        return words + seen[0] + seen[1] + super().words()


HANDED_OVER = [
    Toy,
    ChangesWhatItWasGiven,
    ChangesWhatIsThereTwice,
    CallsAPart,
    ReadsAParameter,
    ReadsAParameterOfTheDenoiser,
    AsksWhereParametersAre,
    HooksALayer,
]


@pytest.mark.parametrize("pipeline_class", HANDED_OVER)
def test_a_recorded_use_of_a_component_is_played_back_with_the_same_numbers(
    pipeline_class: type[Toy], load: Load
) -> None:
    stages = load(pipeline_class)
    made = stages.make()
    assert same(made.output, stages.truth())
    assert not made.is_remote
    assert same(stages.make().output, made.output), "nothing of the first request is left behind"


def test_nothing_of_a_hook_stays_on_a_module_that_requests_share(load: Load) -> None:
    stages = load(HooksALayer)
    stages.make()
    for stage in stages.stages.values():
        for model in (stage.pipeline.text_encoder, stage.pipeline.transformer):
            assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# --- what the VAE stage cannot run again without the numbers ---


class DecidesByNumbers(Toy):
    """As Paradigms: how many steps it makes follows from the latents."""

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for _ in range(3):
            latents = super().denoised(latents, words)
            self.scheduler.set_timesteps(2)
            if bool(latents.abs().max() < 100):
                break
        return latents


class SamplesFromNumbers(Toy):
    """As Amused: tokens are drawn by the probabilities that the denoiser gives."""

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        latents = super().denoised(latents, words)
        tokens = torch.multinomial(latents.softmax(-1), 2)
        return latents + tokens.sum()


class ReturnsLatents(Toy):
    def decoded(self, latents: torch.Tensor) -> Any:
        return StableDiffusionPipelineOutput(self.vae.decode(latents), nsfw_content_detected=latents)


class DecodesBeforeItDenoises(Toy):
    """Also what an offload order that is wrong comes to."""

    def words(self) -> torch.Tensor:
        return super().words() + self.vae.decode(torch.ones(1, WIDTH))


class DecodesInTheLoop(Toy):
    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        latents = super().denoised(latents, words)
        self.scheduler.set_timesteps(2)
        return super().denoised(self.vae.encode(self.vae.decode(latents)), words + self.text_encoder.absent)


REMOTE = [DecidesByNumbers, SamplesFromNumbers, ReturnsLatents, DecodesBeforeItDenoises, DecodesInTheLoop]


@pytest.mark.parametrize("pipeline_class", REMOTE)
def test_what_no_hand_off_serves_is_made_with_remote_calls(pipeline_class: type[Toy], load: Load) -> None:
    stages = load(pipeline_class)
    made = stages.make()
    assert same(made.output, stages.truth())
    assert made.is_remote


class DecodesBeforeItDenoisesWhereAsked(Toy):
    def __call__(
        self, num_inference_steps: int = 4, looks: bool = False, generator: Any = None, output_type: str = "pt"
    ) -> Any:
        if looks:
            self.vae.decode(torch.ones(1, WIDTH))
        return super().__call__(num_inference_steps, generator, output_type)


def test_only_a_kind_of_request_that_needs_remote_calls_is_made_with_them(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    stages = load(DecodesBeforeItDenoisesWhereAsked)
    ways = []
    for arguments in ({}, {"looks": True}, {}, {"looks": True}):
        asked = GenerationRequest("toy", "toy", arguments, SEED, OutputFormat("image", "png"))
        inputs, _ = stages.denoiser.denoise(asked, encode(stages.stages["encoder"], asked))
        ways.append((inputs.kind, stages.denoiser.needs_remote_calls(asked)))
    assert ways == [("decoder_calls", False), ("result", True)] * 2
    told = [(each.levelname, each.message) for each in caplog.records if "needs remote calls" in each.message]
    assert [level for level, message in told if "for requests with looks: " in message] == ["WARNING"]


# --- steps and caches ---


class PredictsAndCorrects(SchedulerMixin, ConfigMixin):
    """As ScoreSdeVe's: it has no method `step`."""

    @register_to_config
    def __init__(self) -> None:
        self.timesteps = torch.arange(0)

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.timesteps = torch.arange(num_inference_steps).flip(0)

    def step_correct(self, output: torch.Tensor, latents: torch.Tensor, generator: Any) -> torch.Tensor:
        return latents + 0.1 * output * torch.randn(latents.shape, generator=generator)

    def step_pred(self, output: torch.Tensor, timestep: Any, latents: torch.Tensor, generator: Any) -> torch.Tensor:
        return latents - 0.2 * output + 0.1 * torch.randn(latents.shape, generator=generator)


class Predicts(Toy):
    def __call__(self, num_inference_steps: int = 4, generator: Any = None, output_type: str = "pt") -> Any:
        words = self.words()
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, WIDTH, generator=generator)
        for timestep in self.scheduler.timesteps:
            latents = self.scheduler.step_correct(self.transformer(latents, timestep, words), latents, generator)
            latents = self.scheduler.step_pred(self.transformer(latents, timestep, words), timestep, latents, generator)
        return self.decoded(latents)


def test_a_scheduler_without_a_method_step_makes_steps_checkpoints_and_resumes(load: Load) -> None:
    stages = load(Predicts, PredictsAndCorrects())
    made, truth = stages.make(), stages.truth()
    assert same(made.output, truth)
    assert made.steps == 4
    assert [checkpoint.step for checkpoint in made.checkpoints] == [1, 2, 3]
    for checkpoint in made.checkpoints:
        assert same(stages.make(checkpoint).output, truth)


class LooksBack(Toy):
    """As AnyFlowFAR: chunks of a video, and a forward after each that writes what the next ones look back to."""

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        cache = {"seen": torch.zeros(1, WIDTH), "count": 0}
        chunks = []
        for _ in range(3):
            self.scheduler.set_timesteps(3)
            chunks.append(super().denoised(latents, words, cache=cache))
            self.transformer(chunks[-1], self.scheduler.timesteps[-1], words, cache=cache, writes=True)
        return torch.cat(chunks)


class WritesAtTheThirdStep(Toy):
    """What it looks back to follows from latents that a resume does not have."""

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        cache = {"seen": torch.zeros(1, WIDTH)}
        for index, timestep in enumerate(self.scheduler.timesteps):
            output = self.transformer(latents, timestep, words, cache=cache, writes=index == 2)
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
        return latents


def test_a_resume_fills_the_caches_that_forwards_of_skipped_rounds_filled(load: Load) -> None:
    stages = load(LooksBack)
    made, truth = stages.make(), stages.truth()
    assert same(made.output, truth)
    assert len(made.checkpoints) >= 7
    for checkpoint in made.checkpoints:
        assert same(stages.make(checkpoint).output, truth), checkpoint.step


def test_a_cache_that_follows_from_skipped_latents_means_start_again(load: Load) -> None:
    stages = load(WritesAtTheThirdStep)
    made, truth = stages.make(), stages.truth()
    assert same(made.output, truth)
    *before, after = made.checkpoints
    assert len(before) == 2
    for checkpoint in before:
        assert same(stages.make(checkpoint).output, truth)
    with pytest.raises(CannotResumeError, match="cannot be skipped"):
        stages.make(after)
