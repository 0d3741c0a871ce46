"""The three stages of a served model in this process, each with its own part of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployments.messages import STAGES, ComponentAnswer, ComponentCall, Envelope, GenerationRequest, StageName
from deployments.model import ModelArgs
from tests.support.stage_parity import ANY_OUTPUT, SEED
from tests.support.stage_worker import StageWorker


class StagesInProcess:
    """Built as their replicas build them, from the arguments of the application."""

    def __init__(self, model: ModelArgs, cache_root: Path, use_streamer: bool = False) -> None:
        self.workers = {stage: StageWorker(stage, self._ask) for stage in STAGES}
        for worker in self.workers.values():
            worker.build(model, cache_root, use_streamer)

    def generate(self, arguments: dict[str, Any]) -> list[Any]:
        """The leaves of the output."""
        request = GenerationRequest("parity", "model", arguments, SEED, ANY_OUTPUT)
        conditioning = self.workers["encoder"].encode(request)
        inputs = self.workers["denoiser"].denoise(request, conditioning, Envelope())
        return self.workers["vae"].decode(request, inputs)

    def held(self, stage: StageName) -> set[str]:
        return set(self.workers[stage].stage.components)

    def close(self) -> None:
        self.workers["denoiser"].denoiser.engine.close()

    def _ask(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        return self.workers[stage].call_component(call)
