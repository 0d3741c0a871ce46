"""A process that shares nothing with the tests' and goes on from the checkpoints that they made."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deployments.devices import select_device
from deployments.messages import Conditioning, DecodeInputs, GenerationRequest
from deployments.model import DenoisingArgs, ModelArgs
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stages.build import build_stage
from deployments.stages.denoise import DenoiserStage
from env_config.variables import EnvConfig
from tests.support.forked import forked_context
from tests.support.tiny_models import tiny_model, tiny_patches


class ResumingProcess:
    """One process; it loads a model when a request for another one comes."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=forked_context(), initializer=_quiet)

    def resume(
        self,
        folder: Path,
        request: GenerationRequest,
        conditioning: Conditioning,
        checkpoint: bytes,
        variables: dict[str, str] | None = None,
    ) -> tuple[DecodeInputs, int]:
        """The hand-off to the VAE stage, and the scheduler steps that were run for it; `checkpoint` is pickled."""
        return self._pool.submit(_resume, folder, request, conditioning, checkpoint, variables or {}).result(280)

    def stop(self) -> None:
        self._pool.shutdown()


def load_denoiser(folder: Path, precision: str | None = None) -> StagePipeline:
    model = ModelArgs(path=str(folder), name=folder.name, precision=precision)
    stage = build_stage(model, ("denoiser",), EnvConfig(), select_device("cpu"))
    after_load = tiny_model(folder.name).after_load
    if after_load is not None:
        after_load(stage.pipeline)
    return stage


def _quiet() -> None:
    torch.set_num_threads(1)
    tiny_patches()
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@lru_cache(1)
def _denoiser(folder: Path, variables: tuple[tuple[str, str], ...]) -> DenoiserStage:
    return DenoiserStage(load_denoiser(folder), DenoisingArgs(), env=EnvConfig.from_environ(dict(variables)))


def _resume(
    folder: Path,
    request: GenerationRequest,
    conditioning: Conditioning,
    checkpoint: bytes,
    variables: dict[str, str],
) -> tuple[DecodeInputs, int]:
    denoiser = _denoiser(folder, tuple(sorted(variables.items())))
    inputs, denoising = denoiser.denoise(request, conditioning, pickle.loads(checkpoint))
    return inputs, denoising.session.steps_done - denoising.session.resumed_at
