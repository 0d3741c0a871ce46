"""The deployment `Denoiser`: the diffusion transformer (or U-Net) and its loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.messages import (
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    Envelope,
    GenerationRequest,
    StageName,
)
from deployments.model import ModelArgs
from deployments.replicas.metrics import DenoiserMetrics
from deployments.replicas.owner_watch import OwnerWatch
from deployments.replicas.replica import StageReplica
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_stream import StreamItem, denoising_stream

T = TypeVar("T")


@serve.deployment(name="Denoiser", max_ongoing_requests=16, health_check_period_s=2, graceful_shutdown_timeout_s=10)
class Denoiser(StageReplica):
    """One replica of the denoiser stage.

    It asks the encoder stage once for each kind of request (to learn how such requests are batched), and the
    others in the loop only for pipelines that need them there. Draining is a bounded wait: what is not done
    by then goes on elsewhere from its last checkpoint.
    """

    def __init__(self, model: ModelArgs, encoder: DeploymentHandle, vae: DeploymentHandle) -> None:
        super().__init__(model, ("denoiser",))
        self._handles: dict[StageName, DeploymentHandle] = {"encoder": encoder, "vae": vae}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owners = OwnerWatch()
        self.denoiser = DenoiserStage(
            self.stage, model.denoising, self._ask_stage, self._encode, self.synchronize, self.env, DenoiserMetrics()
        )

    async def denoise(
        self,
        request: GenerationRequest,
        envelope: Envelope,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None = None,
    ) -> AsyncIterator[StreamItem]:
        """Progress and checkpoints as they come, at last the inputs of the VAE stage."""
        self._loop = asyncio.get_running_loop()
        with self._owners.bound_to(envelope.owner):
            async for item in denoising_stream(self, self.denoiser, request, envelope, conditioning, checkpoint):
                yield item

    async def check_health(self) -> None:
        check_engine(self.denoiser)

    @property
    def denoiser_here(self) -> DenoiserStage:
        return self.denoiser

    def _ask_stage(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        answer: ComponentAnswer = self._wait_for(self._handles[stage].call_component.remote(call))
        return answer

    def _encode(self, request: GenerationRequest) -> Conditioning:
        conditioning: Conditioning = self._wait_for(self._handles["encoder"].encode.remote(request))
        return conditioning

    def _wait_for(self, response: Awaitable[T]) -> Any:
        """Called in the thread of a request; the event loop makes the call."""
        assert self._loop is not None

        async def wait() -> T:
            return await response

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()


def check_engine(denoiser: DenoiserStage) -> None:
    """Raises RuntimeError when the thread that owns the device is gone, so that Serve replaces the replica."""
    if not denoiser.engine.is_alive:
        raise RuntimeError("the engine's thread has ended")
