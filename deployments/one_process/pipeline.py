"""The stages as their replicas build them and do their work, all in this process. Knows no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from deployments.adapters.use import use_of
from deployments.devices import select_device, synchronize
from deployments.engine.fiber import Fiber
from deployments.features import fields_of_features
from deployments.media.files import write_file
from deployments.messages import (
    STAGES,
    UNFOLLOWED,
    ArgumentDescription,
    Checkpoint,
    Conditioning,
    DecodeInputs,
    Effects,
    Envelope,
    GenerationRequest,
    Media,
    StageDescription,
)
from deployments.model import ModelArgs
from deployments.modules import AccelerationError
from deployments.observability.observer import ObservedReplica, Observers
from deployments.observability.table import OBSERVERS
from deployments.replicas.threads import StageThreads
from deployments.stage_pipeline.description import describe_stage
from deployments.stages.adapters import Brought, brought, described, give_back_of_encoders, uses_of, with_contents
from deployments.stages.build import build_stage
from deployments.stages.decode import decode
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_stream import StreamItem, denoising_stream
from deployments.stages.effects import arguments_of, effects_of
from deployments.stages.encode import encode
from env_config.variables import EnvConfig

T = TypeVar("T")


class WholePipeline:
    """What a replica of all three stages does, for callers in this process."""

    def __init__(self, model: ModelArgs, env: EnvConfig) -> None:
        """Raises what `build_stage` raises, and DeviceError for a device that is not here."""
        asked = {"parallel": model.parallel, "vae.parallel": model.vae.parallel}
        for setting in [setting for setting, ranks in asked.items() if ranks is not None]:
            raise AccelerationError(
                f"{setting}: ranks are processes of their own, which an application on Ray Serve has"
            )
        self.device = select_device(env.runtime.target_device)
        self.observers = Observers(ObservedReplica(env, "here", STAGES, lambda: synchronize(self.device)), OBSERVERS)
        self.stage = build_stage(model, STAGES, env, self.device, self.observers.wrap_kernel)
        self.observers.install(self.stage.components)
        self.threads = StageThreads(self.observers)
        self.denoiser = DenoiserStage(
            self.stage, model.denoising, encode=lambda request: encode(self.stage, request), env=env
        )

    # -- the work of the stages -----------------------------------------------------------------------------

    async def encode(self, request: GenerationRequest, envelope: Envelope = UNFOLLOWED) -> Conditioning:
        found = await self._brought(request)
        return await self.threads.run(self.stage, "encoder", with_contents(request, found), envelope, encode)

    def denoise(
        self,
        request: GenerationRequest,
        envelope: Envelope,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None = None,
    ) -> AsyncIterator[StreamItem]:
        return denoising_stream(self.threads, self.denoiser, request, envelope, conditioning, checkpoint)

    async def decode(self, request: GenerationRequest, inputs: DecodeInputs, envelope: Envelope = UNFOLLOWED) -> Media:
        decoded = await self.threads.run(self.stage, "vae", request, envelope, decode, inputs)
        started = time.perf_counter()
        files = tuple(await asyncio.gather(*(self._aside(write_file, file) for file in decoded.files)))
        seconds = decoded.seconds | {"encode_media": time.perf_counter() - started}
        return Media(files, seconds, decoded.usage, inputs.num_steps, inputs.warnings)

    async def _brought(self, request: GenerationRequest) -> Brought:
        uses = uses_of(request)
        return await self._aside(brought, self.stage, uses) if uses else []

    # -- what else the application asks -----------------------------------------------------------------------

    async def describe(self) -> StageDescription:
        return replace(describe_stage(self.stage), features=fields_of_features())

    async def effects(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        return await self._aside(effects_of, self.stage, request, asked)

    async def arguments(
        self, names: tuple[str, ...], defaults: dict[str, Any], model: str
    ) -> list[ArgumentDescription]:
        return await self._aside(arguments_of, self.stage, names, defaults)

    async def inspect_adapter(self, use: dict[str, Any]) -> dict[str, Any]:
        return await self._aside(described, self.stage, use_of(use))

    async def adapters_held(self) -> Sequence[str]:
        held: Sequence[str] = self.stage.adapters.held()
        return held

    async def forget_adapter(self, digest: str) -> None:
        self.stage.adapters.forget(digest)
        await self.threads.in_worker(give_back_of_encoders, self.stage)
        work = partial(self.stage.adapters.give_back, self.stage.layout.denoisers)
        self.denoiser.engine.submit(Fiber("forgotten adapters"), work)

    async def timings_of(self, request_id: str) -> list[dict[str, Any]]:
        return self.observers.recall(request_id)

    async def _aside(self, function: Callable[..., T], *arguments: Any) -> T:
        """In a thread that may wait."""
        return await asyncio.get_running_loop().run_in_executor(self.threads.request_threads, function, *arguments)

    def close(self) -> None:
        self.denoiser.engine.close()
        self.threads.close()
