"""Stages that share a process: `EncoderVAE` beside a denoiser of its own, and `Pipeline` that holds all."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ray import serve

from deployments.messages import (
    STAGES,
    UNFOLLOWED,
    Checkpoint,
    Conditioning,
    DecodeInputs,
    Envelope,
    GenerationRequest,
    Media,
)
from deployments.model import ModelArgs
from deployments.replicas.denoiser import check_engine
from deployments.replicas.metrics import DenoiserMetrics
from deployments.replicas.owner_watch import OwnerWatch
from deployments.replicas.replica import StageReplica
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_stream import StreamItem, denoising_stream
from deployments.stages.encode import encode


@serve.deployment(name="EncoderVAE", max_ongoing_requests=32, health_check_period_s=2)
class EncoderVAE(StageReplica):
    """One replica that encodes and decodes."""

    def __init__(self, model: ModelArgs) -> None:
        super().__init__(model, ("encoder", "vae"))

    async def encode(self, request: GenerationRequest, envelope: Envelope = UNFOLLOWED) -> Conditioning:
        return await self.encode_for(request, envelope)

    async def decode(self, request: GenerationRequest, inputs: DecodeInputs) -> Media:
        return await self.decode_and_write(request, inputs)


@serve.deployment(name="Pipeline", max_ongoing_requests=16, health_check_period_s=2, graceful_shutdown_timeout_s=10)
class Pipeline(StageReplica):
    """One replica that does all three stages' work, with the same calls."""

    def __init__(self, model: ModelArgs) -> None:
        super().__init__(model, STAGES)
        self._owners = OwnerWatch()
        self.denoiser = DenoiserStage(
            self.stage,
            model.denoising,
            encode=lambda r: encode(self.stage, r),
            synchronize=self.synchronize,
            env=self.env,
            measure=DenoiserMetrics(),
        )

    async def encode(self, request: GenerationRequest, envelope: Envelope = UNFOLLOWED) -> Conditioning:
        return await self.encode_for(request, envelope)

    async def denoise(
        self,
        request: GenerationRequest,
        envelope: Envelope,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None = None,
    ) -> AsyncIterator[StreamItem]:
        with self._owners.bound_to(envelope.owner):
            async for item in denoising_stream(self, self.denoiser, request, envelope, conditioning, checkpoint):
                yield item

    async def check_health(self) -> None:
        check_engine(self.denoiser)

    @property
    def denoiser_here(self) -> DenoiserStage:
        return self.denoiser

    async def decode(self, request: GenerationRequest, inputs: DecodeInputs) -> Media:
        return await self.decode_and_write(request, inputs)
