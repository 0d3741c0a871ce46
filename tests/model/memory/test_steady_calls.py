"""A decoder that is called from the loop gives a deterministic request the same bytes whatever memory is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.memory.stage_memory import StageMemory
from deployments.messages import STAGES, Envelope, GenerationRequest, OutputFormat, StageName
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from tests.support.fitting_autoencoder import Played
from tests.support.toy_pipelines import SEED, SPLIT, WIDTH, Toy, ToyStages

FREE, MOST = 10**9, 10**12  # bytes, as the device is played


class LooksAtEachStep(Toy):
    """What is decoded after each step is the next step's latents."""

    def __call__(self, num_inference_steps: int = 2, generator: Any = None, output_type: str = "pt") -> Any:
        words = self.words()
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, WIDTH, generator=generator)
        for timestep in self.scheduler.timesteps:
            latents = self.vae.decode(self.transformer(latents, timestep, words))
        return self.decoded(latents)


@pytest.mark.parametrize("processes", [SPLIT, (STAGES,)], ids=["three processes", "one process"])
def test_calls_of_the_loop_are_as_steady_as_their_request(
    processes: tuple[tuple[StageName, ...], ...], tmp_path: Path
) -> None:
    toy = ToyStages(LooksAtEachStep, tmp_path, processes=processes)
    toy.close()
    stages = {id(stage): replace(stage, memory=StageMemory(Played(FREE))) for stage in toy.stages.values()}
    toy.stages = {name: stages[id(stage)] for name, stage in toy.stages.items()}
    toy.denoiser = toy.new_denoiser()
    vae = toy.stages["vae"]
    seen: list[int | None] = []
    vae.components["vae"].decode = noting(vae.components["vae"].decode, lambda: seen.append(vae.memory.available()))
    for deterministic in (True, False):
        denoise(toy.denoiser, vae, toy.stages["encoder"], deterministic)
    assert seen == [MOST] * 3 + [FREE] * 3
    toy.close()


def noting(function: Callable[..., Any], note: Callable[[], None]) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return function(*args, **kwargs)

    return noted


def denoise(denoiser: DenoiserStage, vae: Any, encoder: Any, deterministic: bool) -> None:
    request = GenerationRequest("r", "toy", {}, SEED, OutputFormat("image", "png"), deterministic=deterministic)
    denoiser.denoise(request, encode(encoder, request), envelope=Envelope(remote_calls=True))
