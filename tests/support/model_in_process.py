"""The whole application in this process with a real model in its stages: HTTP, the three stages, no Ray."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ray.exceptions import RayTaskError

from deployments.features import fields_of_features
from deployments.media.files import write_file
from deployments.messages import (
    STAGES,
    ArgumentDescription,
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    Effects,
    Envelope,
    GenerationRequest,
    Media,
    StageDescription,
    StageName,
)
from deployments.model import DenoisingArgs
from deployments.observability.observer import StageWork
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stages.decode import Decoded, decode
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_stream import denoising_stream
from deployments.stages.effects import arguments_of, effects_of
from deployments.stages.encode import encode
from env_config.variables import EnvConfig
from serve_app.http.app import http_app
from serve_app.making.stages import Stages
from serve_app.service import ServiceArgs, open_service
from tests.support.played_stages import Method, Reference, Stream
from tests.support.tiny_models import TINY_MODELS, tiny_patches

# As serve_app.app places them: the stages of each process.
PLACEMENTS: dict[str, tuple[tuple[StageName, ...], ...]] = {
    "three_stage": (("encoder",), ("denoiser",), ("vae",)),
    "two_stage": (("encoder", "vae"), ("denoiser",)),
    "one_stage": (STAGES,),
}


class RequestThreads:
    """Those of a replica, unobserved."""

    def __init__(self) -> None:
        self.request_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="request")

    @contextmanager
    def observed_denoising(
        self, request: GenerationRequest, envelope: Envelope, arrived: float, conditioning: Conditioning
    ) -> Iterator[StageWork]:
        yield StageWork("denoiser", request, arrived, envelope)


class ModelHandle:
    """The handle of every stage of one model."""

    deployment_name = "Model"
    app_name = "app"

    def __init__(self, folder: Path, placement: str) -> None:
        tiny_patches()
        loaded = {stages: load_stage(folder, stages) for stages in PLACEMENTS[placement]}
        self.held = {name: stage for stages, stage in loaded.items() for name in stages}
        after_load = TINY_MODELS[folder.name].after_load if folder.name in TINY_MODELS else None
        for stage in loaded.values() if after_load else ():
            after_load(stage.pipeline)
        self.denoiser = DenoiserStage(
            self.held["denoiser"], DenoisingArgs(max_wait_s=0.0), self._ask, lambda r: encode(self.held["encoder"], r)
        )
        self.threads = RequestThreads()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage")
        self.requests: list[GenerationRequest] = []
        self.decoded: dict[str, Decoded] = {}  # what files were made of, by the ids of requests
        self.describe = Method(self._describe)
        self.encode = Method(self._encode)
        self.denoise = Method(self._denoise)
        self.decode = Method(self._decode)
        self.effects = Method(self._effects)
        self.arguments = Method(self._arguments)

    def options(self, **_: Any) -> ModelHandle:
        return self

    def close(self) -> None:
        self.denoiser.engine.close()
        self.worker.shutdown()
        self.threads.request_threads.shutdown()

    async def _describe(self) -> StageDescription:
        return describe(self.held["encoder"])

    def _encode(self, request: GenerationRequest, envelope: Envelope) -> asyncio.Task[Any]:
        self.requests.append(request)
        work = asyncio.create_task(self._in_worker(encode, self.held["encoder"], request))
        work.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may ask for it
        return work

    def _denoise(
        self,
        request: GenerationRequest,
        envelope: Envelope,
        conditioning: asyncio.Task[Conditioning],
        checkpoint: Checkpoint | None,
    ) -> Stream:
        return Stream(self._items(request, envelope, conditioning, checkpoint))

    async def _items(
        self,
        request: GenerationRequest,
        envelope: Envelope,
        conditioning: asyncio.Task[Conditioning],
        checkpoint: Checkpoint | None,
    ) -> AsyncIterator[Any]:
        encoded = await conditioning
        try:
            items = denoising_stream(self.threads, self.denoiser, request, envelope, encoded, checkpoint)
            async for item in items:
                yield item
        except Exception as error:
            raise as_ray_tells(error) from error

    async def _decode(self, request: GenerationRequest, inputs: Reference | DecodeInputs, _: Envelope) -> Media:
        given = inputs.value if isinstance(inputs, Reference) else inputs
        decoded = self.decoded[request.request_id] = await self._in_worker(decode, self.held["vae"], request, given)
        return await self._in_worker(written, decoded)

    async def _effects(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        return await self._in_worker(effects_of, self.held["encoder"], request, asked)

    async def _arguments(
        self, names: tuple[str, ...], defaults: dict[str, Any], model: str
    ) -> list[ArgumentDescription]:
        return await self._in_worker(arguments_of, self.held["encoder"], names, defaults)

    async def _in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self.worker, function, *args)
        except Exception as error:
            raise as_ray_tells(error) from error

    def _ask(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        return answer_call(self.held[stage], call)


def describe(stage: StagePipeline) -> StageDescription:
    features = fields_of_features()
    described = vars(describe_stage(stage)) | {"features": features}
    return StageDescription(**described)


def written(decoded: Decoded) -> Media:
    return Media(tuple(write_file(file) for file in decoded.files), decoded.seconds)


def as_ray_tells(error: Exception) -> Exception:
    """What the caller of another process gets."""
    cause = pickle.loads(pickle.dumps(error))
    told: Exception = RayTaskError("work", "a traceback with /a/path", cause).as_instanceof_cause()
    return told


class ModelServer:
    """A served model, and how a client asks it."""

    def __init__(self, folder: Path, outputs: Path, placement: str = "three_stage", **args: Any) -> None:
        self.handle = ModelHandle(folder, placement)
        self._args = ServiceArgs(
            model_name=folder.name, output_directory=outputs, url_style="path", allowed_hosts=("test",), **args
        )
        self._env = EnvConfig.model_validate({"runtime": {"cache_root": outputs.with_name(f"{outputs.name}-cache")}})
        self._loop = asyncio.new_event_loop()
        stage: Any = self.handle
        self.service = self._loop.run_until_complete(
            open_service(self._args, self._env, {folder.name: Stages(stage, stage, stage)}, "app")
        )
        [self.model] = self.service.models.all()
        self.app = http_app(self.service)
        self._loop.run_until_complete(self._start())
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120)

    async def _start(self) -> None:
        self.service.start()

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return self._loop.run_until_complete(self._client.request(method, path, **arguments))

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return self.ask("POST", path, **arguments)

    def make(self, request: GenerationRequest) -> Media:
        """As a route does, without the checks at the door."""
        [media] = self._loop.run_until_complete(self.model.at_once.all([request], "caller"))
        return media

    def close(self) -> None:
        self.service.close()
        self._loop.run_until_complete(self._client.aclose())
        self._loop.run_until_complete(asyncio.sleep(0))
        self.handle.close()
        self._loop.close()


@contextmanager
def model_served(folder: Path, outputs: Path, placement: str = "three_stage", **args: Any) -> Iterator[ModelServer]:
    """The checkpoint of a tiny model, served in this process."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    server = ModelServer(folder, outputs, placement, **args)
    try:
        yield server
    finally:
        server.close()
