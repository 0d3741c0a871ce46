"""Casts and switches that a pipeline makes for a request end with it: the next one finds the models as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from deployments.errors import TriptychError
from tests.support.toy_pipelines import WIDTH, Toy, ToyStages, same

HALF = torch.float16
Load = Any


class HalfToy(Toy):
    """In the dtype of its models, as pipelines are."""

    def words(self) -> torch.Tensor:
        words: torch.Tensor = self.text_encoder(torch.ones(1, WIDTH, dtype=self.text_encoder.dtype))[-1]
        return words

    def decoded(self, latents: torch.Tensor) -> Any:
        return StableDiffusionPipelineOutput(self.vae.decode(latents.to(self.vae.dtype)), nsfw_content_detected=None)

    def __call__(self, num_inference_steps: int = 4, generator: Any = None, output_type: str = "pt") -> Any:
        words = self.words()
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, WIDTH, generator=generator).to(self.transformer.dtype)
        return self.decoded(self.denoised(latents, words))


class UpcastsTheVae(HalfToy):
    """As Stable Diffusion XL, which undoes it at its end, where a stage has stopped already."""

    def decoded(self, latents: torch.Tensor) -> Any:
        needs_upcasting = self.vae.dtype == HALF
        if needs_upcasting:
            self.vae.to(dtype=torch.float32)
            latents = latents.to(next(iter(self.vae.parameters())).dtype)
        output = StableDiffusionPipelineOutput(self.vae.decode(latents), nsfw_content_detected=None)
        if needs_upcasting:
            self.vae.to(dtype=HALF)
        return output


class TakesTheCastVae(HalfToy):
    """As Stable Diffusion XL on MPS: the answer of a cast takes the place of the component."""

    def decoded(self, latents: torch.Tensor) -> Any:
        self.vae = self.vae.to(torch.float32)
        return super().decoded(latents)


class LeavesTheVaeInAnotherDtype(HalfToy):
    """As the img2img of Stable Diffusion XL, which casts its autoencoder to the dtype of the embeddings."""

    def words(self) -> torch.Tensor:
        self.vae.to(torch.float32)
        seen = self.vae.encode(torch.ones(1, WIDTH))
        self.vae.to(torch.bfloat16)
        return super().words() + seen.to(HALF)


class CastsPartsBackAndForth(HalfToy):
    """As AnimateDiff: all in float32 but some parts, which stay as they were."""

    def decoded(self, latents: torch.Tensor) -> Any:
        dtype = self.vae.dtype
        self.vae.to(dtype=torch.float32)
        self.vae.quantize.to(dtype)
        return super().decoded(self.vae.quantize(latents.to(dtype)))


class CastsTheTextEncoder(HalfToy):
    def words(self) -> torch.Tensor:
        self.text_encoder.float().train()
        words = super().words().to(HALF)
        return words + self.text_encoder.training * super().words().to(HALF)


class CastsTheDenoiser(HalfToy):
    def words(self) -> torch.Tensor:
        words = super().words()
        self.transformer.to(torch.float32).train()
        return words.float()


class CastsThroughAList(HalfToy):
    """Models that lie elsewhere in the pipeline than under their names."""

    def __init__(self, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__(text_encoder, transformer, vae, scheduler)
        self.models = [text_encoder, vae]
        self.by_name = {"decoders": (vae,)}
        self.last = vae.decoder

    def words(self) -> torch.Tensor:
        words = super().words()
        self.models[0].to(torch.float64)
        return words

    def decoded(self, latents: torch.Tensor) -> Any:
        self.models[1].to(torch.float32)
        self.last.linear.to(torch.float64)
        self.by_name["decoders"][0].encoder.train()
        return StableDiffusionPipelineOutput(self.vae.decode(latents.double()), nsfw_content_detected=None)


class SetsAttributes(HalfToy):
    def words(self) -> torch.Tensor:
        first = getattr(self.vae, "uses", 0)
        self.vae.uses = first + 1
        self.text_encoder.layers[0].uses = 1 + getattr(self.text_encoder.layers[0], "uses", 0)
        self.text_encoder.layers[1] = torch.nn.Identity()
        return super().words() * (first + self.text_encoder.layers[0].uses)


class CastsForARemoteCall(HalfToy):
    """Decoded latents flow back into the loop: the calls are made where the decoder is, in the dtype of the request."""

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.vae.to(torch.float32)
        self.vae.decoder.train()
        latents = super().denoised(latents, words + self.vae.decode(latents.float()).to(HALF), **kwargs)
        return latents + self.vae.decode(latents.float()).to(HALF)


PIPELINES = [
    UpcastsTheVae,
    TakesTheCastVae,
    LeavesTheVaeInAnotherDtype,
    CastsPartsBackAndForth,
    CastsTheTextEncoder,
    CastsTheDenoiser,
    CastsThroughAList,
    SetsAttributes,
    CastsForARemoteCall,
]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    loaded: list[ToyStages] = []

    def load(pipeline_class: type[Toy]) -> ToyStages:
        loaded.append(ToyStages(pipeline_class, tmp_path, dtype=HALF))
        return loaded[-1]

    yield load
    for stages in loaded:
        stages.close()


def shared_state(stages: ToyStages) -> list[Any]:
    """All of the models of all stages that a request might change."""
    found: list[Any] = []
    for stage in stages.stages.values():
        for name in ("text_encoder", "transformer", "vae"):
            for path, module in getattr(stage.pipeline, name).named_modules():
                tensors = [(n, id(p), p.dtype, p.data_ptr()) for n, p in module.named_parameters(recurse=False)]
                found.append((name, path, module.training, list(module._modules), sorted(vars(module)), tensors))
    return found


@pytest.mark.parametrize("pipeline_class", PIPELINES)
def test_the_second_request_makes_the_numbers_of_the_first(pipeline_class: type[Toy], load: Load) -> None:
    stages = load(pipeline_class)
    before = shared_state(stages)
    truth = stages.truth()
    made = []
    for _ in range(2):
        made.append(stages.make())
        assert shared_state(stages) == before
    assert same(made[0].output, truth)
    assert same(made[1].output, truth)
    assert made[0].is_remote is (pipeline_class is CastsForARemoteCall)


class FailsAfterItsCasts(HalfToy):
    stage = "encoder"

    def fail_in(self, stage: str) -> None:
        if self.stage == stage:
            raise ValueError("what the caller asked for cannot be done")

    def words(self) -> torch.Tensor:
        words = super().words()
        self.text_encoder.float()
        self.vae.to(torch.float32)
        self.fail_in("encoder")
        return words

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.transformer.float()
        latents = super().denoised(latents.float(), words.float(), **kwargs)
        self.fail_in("denoiser")
        return latents

    def decoded(self, latents: torch.Tensor) -> Any:
        output = super().decoded(latents)
        self.fail_in("vae")
        return output


@pytest.mark.parametrize("stage", ["encoder", "denoiser", "vae"])
def test_a_request_that_fails_leaves_nothing_behind(stage: str, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = load(FailsAfterItsCasts)
    before = shared_state(stages)
    monkeypatch.setattr(FailsAfterItsCasts, "stage", "none")
    truth = stages.truth()
    monkeypatch.setattr(FailsAfterItsCasts, "stage", stage)
    with pytest.raises(TriptychError):
        stages.make()
    assert shared_state(stages) == before
    monkeypatch.setattr(FailsAfterItsCasts, "stage", "none")
    assert same(stages.make().output, truth)
