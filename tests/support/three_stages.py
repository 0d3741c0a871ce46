"""The three stages of one model in this process, with the step engine and remote calls between them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from deployments.messages import STAGES, Checkpoint, ComponentAnswer, ComponentCall, GenerationRequest, StageName
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.encode import encode
from tests.support.tiny_models import tiny_patches


class ThreeStages:
    """Each stage holds its own part of the model, or `in_one` all share it; `make` is what a request goes through."""

    def __init__(self, folder: Path, in_one: bool = False) -> None:
        tiny_patches()
        parts = [(stage,) for stage in STAGES] if not in_one else [STAGES]
        self.held = {name: stage for part in parts for stage in [load_stage(folder, part)] for name in part}
        self.asked: list[StageName] = []  # the stages that were asked to make a component call
        args = DenoisingArgs(max_wait_s=1.0, checkpoint_every=1, merging="always")
        self.denoiser = DenoiserStage(
            self.held["denoiser"], args, self._ask, lambda request: encode(self.held["encoder"], request)
        )

    def make(self, request: GenerationRequest, checkpoint: Checkpoint | None = None) -> list[Any]:
        """The leaves of the output."""
        return self.make_and_save(request, checkpoint)[0]

    def make_and_save(
        self, request: GenerationRequest, checkpoint: Checkpoint | None = None
    ) -> tuple[list[Any], list[Checkpoint]]:
        made: list[Checkpoint] = []
        conditioning = encode(self.held["encoder"], request)
        follower = DenoisingFollower(checkpoint=made.append)
        inputs, _ = self.denoiser.denoise(request, conditioning, checkpoint, follower=follower)
        output = decode_output(self.held["vae"], request, inputs)
        return torch.utils._pytree.tree_leaves(dict(output)), made

    def make_together(self, requests: list[GenerationRequest]) -> list[list[Any]]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(self.make, requests))

    def close(self) -> None:
        self.denoiser.engine.close()

    def _ask(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        self.asked.append(stage)
        return answer_call(self.held[stage], call)
