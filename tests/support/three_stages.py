"""The three stages of one model in this process, with the step engine and remote calls between them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from deployments.adapters.args import AdapterCacheArgs
from deployments.messages import (
    STAGES,
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    DecodeInputs,
    GenerationRequest,
    StageName,
)
from deployments.model import DenoisingArgs, ModelArgs
from deployments.ranks.group import RankGroup
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stages.adapters import answer_with_adapters, with_adapters
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import NO_FOLLOWER, DenoisingFollower
from deployments.stages.encode import encode
from tests.support.tiny_models import tiny_patches


class ThreeStages:
    """Each stage holds its own part of the model, or `in_one` all share it; `make` is what a request goes through.

    `ranks` make the forwards of the denoiser.
    """

    def __init__(
        self,
        folder: Path,
        in_one: bool = False,
        adapter_cache: AdapterCacheArgs | None = None,
        ranks: RankGroup | None = None,
    ) -> None:
        tiny_patches()
        parts = [(stage,) for stage in STAGES] if not in_one else [STAGES]
        model = ModelArgs(path=str(folder), name=folder.name, adapter_cache=adapter_cache or AdapterCacheArgs())

        def loaded(part: tuple[StageName, ...]) -> StagePipeline:
            return with_adapters(load_stage(folder, part), model, folder.parent / "cache")

        self.held = {name: stage for part in parts for stage in [loaded(part)] for name in part}
        self.asked: list[StageName] = []  # the stages that were asked to make a component call
        args = DenoisingArgs(max_wait_s=1.0, checkpoint_every=1, merging="always")
        self.denoiser = DenoiserStage(
            self.held["denoiser"],
            args,
            self._ask,
            lambda request: encode(self.held["encoder"], request),
            adapters=self.held["denoiser"].adapters,
            ranks=ranks,
        )

    def make(self, request: GenerationRequest, checkpoint: Checkpoint | None = None) -> list[Any]:
        """The leaves of the output."""
        return self.make_and_save(request, checkpoint)[0]

    def make_and_save(
        self, request: GenerationRequest, checkpoint: Checkpoint | None = None
    ) -> tuple[list[Any], list[Checkpoint]]:
        made: list[Checkpoint] = []
        inputs = self.hand_off(request, checkpoint, DenoisingFollower(checkpoint=made.append))
        output = decode_output(self.held["vae"], request, inputs)
        return torch.utils._pytree.tree_leaves(dict(output)), made

    def hand_off(
        self,
        request: GenerationRequest,
        checkpoint: Checkpoint | None = None,
        follower: DenoisingFollower = NO_FOLLOWER,
    ) -> DecodeInputs:
        """What the VAE stage gets."""
        conditioning = encode(self.held["encoder"], request)
        return self.denoiser.denoise(request, conditioning, checkpoint, follower=follower)[0]

    def make_together(self, requests: list[GenerationRequest]) -> list[list[Any]]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(self.make, requests))

    def hand_off_together(self, requests: list[GenerationRequest]) -> list[DecodeInputs]:
        """They come to the denoiser at once."""
        conditionings = [encode(self.held["encoder"], request) for request in requests]
        with ThreadPoolExecutor(len(requests)) as threads:
            return [inputs for inputs, _ in threads.map(self.denoiser.denoise, requests, conditionings)]

    def close(self) -> None:
        self.denoiser.engine.close()

    def _ask(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        self.asked.append(stage)
        return answer_with_adapters(self.held[stage], call)
