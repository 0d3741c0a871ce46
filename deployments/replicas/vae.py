"""The deployment `VAE`: decoders and the writing of files."""

from __future__ import annotations

from ray import serve

from deployments.messages import DecodeInputs, GenerationRequest, Media
from deployments.model import ModelArgs
from deployments.replicas.replica import StageReplica


@serve.deployment(name="VAE", max_ongoing_requests=32, health_check_period_s=2)
class VAE(StageReplica):
    """One replica of the VAE stage."""

    def __init__(self, model: ModelArgs) -> None:
        super().__init__(model, ("vae",))

    async def decode(self, request: GenerationRequest, inputs: DecodeInputs) -> Media:
        return await self.decode_and_write(request, inputs)
