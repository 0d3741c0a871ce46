"""The deployment `Encoder`: text and image encoders (and the VAE's encoder half where a pipeline needs it)."""

from __future__ import annotations

from ray import serve

from deployments.messages import UNFOLLOWED, Conditioning, Envelope, GenerationRequest
from deployments.model import ModelArgs
from deployments.replicas.replica import StageReplica


@serve.deployment(name="Encoder", max_ongoing_requests=32, health_check_period_s=2)
class Encoder(StageReplica):
    """One replica of the encoder stage."""

    def __init__(self, model: ModelArgs) -> None:
        super().__init__(model, ("encoder",))

    async def encode(self, request: GenerationRequest, envelope: Envelope = UNFOLLOWED) -> Conditioning:
        return await self.encode_for(request, envelope)
