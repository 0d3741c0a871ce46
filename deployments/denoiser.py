"""The deployment `Denoiser`: the diffusion transformer (or U-Net) and its loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.denoising.stage import DenoiserStage
from deployments.denoising.stream import denoising_stream
from deployments.messages import (
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    DenoisingProgress,
    GenerationRequest,
    PayloadFollows,
    StageName,
)
from deployments.model import ModelArgs
from deployments.replica import StageReplica


@serve.deployment(name="Denoiser", max_ongoing_requests=8, health_check_period_s=2)
class Denoiser(StageReplica):
    """One replica of the denoiser stage; it asks the others only for pipelines that need them in their loop."""

    def __init__(self, model: ModelArgs, encoder: DeploymentHandle, vae: DeploymentHandle) -> None:
        super().__init__(model, ("denoiser",))
        self._handles: dict[StageName, DeploymentHandle] = {"encoder": encoder, "vae": vae}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.denoiser = DenoiserStage(self.stage, self._ask_stage)

    async def denoise(
        self, request: GenerationRequest, conditioning: Conditioning
    ) -> AsyncIterator[DenoisingProgress | PayloadFollows | DecodeInputs]:
        """Progress, then an announcement, then the inputs of the VAE stage."""
        self._loop = asyncio.get_running_loop()
        async for item in denoising_stream(self.denoiser, self.in_worker, request, conditioning):
            yield item

    def _ask_stage(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        """Called in the worker thread; the event loop makes the call."""
        assert self._loop is not None

        async def ask() -> ComponentAnswer:
            answer: ComponentAnswer = await self._handles[stage].call_component.remote(call)
            return answer

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result()
