"""The application in this process: the real root and routes, with stages that make pictures at once."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.messages import GenerationRequest, Media, MediaFile, StageDescription
from deployments.metrics.meter import NO_METER, Meter
from env_config.variables import EnvConfig
from serve_app.http.app import http_app
from serve_app.making.sleep.deployment_states import DeploymentStates, State
from serve_app.making.sleep.kept_facts import Facts
from serve_app.making.sleep.model_sleep import ModelSleep
from serve_app.making.stages import Stages
from serve_app.models.registry import ServedModels
from serve_app.models.service import ModelService
from serve_app.requests.input_pictures import PictureRules
from serve_app.service import Service, ServiceArgs, open_service
from tests.support.job_stores import put_tables
from tests.support.kept_fields import keep_fields
from tests.support.played_stages import PlayedHandle, played

keep_fields()

TEXT_TO_IMAGE = StageDescription(
    stages=("encoder",),
    pipeline_class="FluxPipeline",
    parameters={
        "prompt": None,
        "negative_prompt": None,
        "width": None,
        "height": None,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "true_cfg_scale": 1.0,
    },
    required=(),
    media_kind="image",
    size_multiple=16,
    default_width=32,
    default_height=32,
    device="cpu",
    dtype="float32",
    weight_bytes={},
    process_id=1,
)


def description(pipeline_class: str, *more_parameters: str, **changes: Any) -> StageDescription:
    """A text-to-image pipeline with further parameters."""
    parameters = TEXT_TO_IMAGE.parameters | dict.fromkeys(more_parameters)
    return StageDescription(
        **{**vars(TEXT_TO_IMAGE), "pipeline_class": pipeline_class, "parameters": parameters, **changes}
    )


def picture(
    width: int = 32, height: int = 32, format: str = "png", colour: tuple[int, int, int] = (200, 30, 30)
) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, format)
    return file.getvalue()


async def make_at_once(request: GenerationRequest) -> Media:
    """In place of the stages: one picture of the size that was asked for."""
    await asyncio.sleep(0)
    width, height = request.arguments.get("width", 32), request.arguments.get("height", 32)
    data = picture(width, height, request.output.format)
    file = MediaFile(data, f"image/{request.output.format}", width, height)
    return Media((file,), {"denoise": 0.02, "denoiser_forwards": 0.01, "decode": 0.001, "encode_media": 0.001})


class PlayedFacts:
    """In place of Ray's key-value store, of one model."""

    def __init__(self) -> None:
        self.kept = Facts()
        self.used: list[str] = []  # the deployments that requests came to

    async def note_use(self, deployment: str) -> None:
        self.used.append(deployment)

    async def read(self) -> Facts:
        return self.kept

    async def write(self, facts: Facts) -> None:
        self.kept = facts


class Server:
    """The application as a client reaches it, itself an ASGI application; its service is opened by the first request.

    `make` plays the stages; `requests` are those that came as far as them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.make: Callable[[GenerationRequest], Awaitable[Media]] = make_at_once
        self.meter: Meter = NO_METER  # of the next service
        self.environment: dict[str, dict[str, Any]] = {}  # variables by section, of the next service
        self.states: dict[str, State] | None = None  # of the deployments, as Serve would say; None: no Serve
        self.facts = PlayedFacts()  # what outlives an ingress replica
        self._opened: tuple[Service, ASGIApp] | None = None
        self.configure()

    def configure(
        self,
        describing: StageDescription = TEXT_TO_IMAGE,
        pictures: PictureRules | None = None,
        several: Mapping[str, StageDescription] | None = None,
        **args: Any,
    ) -> None:
        """Start again with these arguments of the application, and `pictures` in place of the rules that they make.

        `several`: what each of `models` says of itself, by its name.
        """
        self.close()
        names: dict[str, Any] = {"models": {each: {} for each in several}} if several else {"model_name": "flux"}
        self._args = ServiceArgs(
            **{
                **names,
                "output_directory": self.folder,
                "url_style": "path",
                "allowed_hosts": ("test",),
                **args,
            }
        )
        self._pictures = pictures
        self._opening = asyncio.Lock()
        self.handles = {name: self._played(each, name) for name, each in (several or {}).items()}
        self.handle = next(iter(self.handles.values()), None) or self._played(describing)

    def _played(self, describing: StageDescription, name: str | None = None) -> PlayedHandle:
        handle = PlayedHandle(describing, lambda request: self.make(request), make_at_once)
        if name is not None:
            handle.deployment_name = f"Played-{name}"
        return handle

    @property
    def requests(self) -> list[GenerationRequest]:
        return self.handle.requests

    @property
    def service(self) -> Service:
        """Once it is open."""
        assert self._opened is not None
        return self._opened[0]

    @property
    def model(self) -> ModelService:
        """The one that is served, once the service is open."""
        [model] = self.service.models.all()
        return model

    async def open(self) -> ASGIApp:
        """The application; a second time the same one."""
        async with self._opening:
            if self._opened is None:
                self._opened = await self._open()
        return self._opened[1]

    async def _open(self) -> tuple[Service, ASGIApp]:
        cache_root = put_tables(self.folder.with_name(f"{self.folder.name}-cache"))
        runtime = {"cache_root": cache_root, **self.environment.get("runtime", {})}
        env = EnvConfig.model_validate({**self.environment, "runtime": runtime})
        service = await open_service(self._args, env, self.all_stages(), "app")
        if self._pictures is not None:
            [model] = service.models.all()
            changed = dataclasses.replace(model, pictures=self._pictures)
            service = dataclasses.replace(service, models=ServedModels([changed]))
        return service, http_app(service)

    def stages(self) -> Stages:
        """Of the one model of the next service."""
        return played(self.handle)

    def all_stages(self) -> dict[str, Stages]:
        """Of the next service, by the name of the model."""
        several = {name: played(handle) for name, handle in self.handles.items()}
        stages = several or {self._args.model_name or "": self.stages()}
        stages = {name: dataclasses.replace(each, meter=self.meter) for name, each in stages.items()}
        if self.states is not None:
            states = DeploymentStates("app", lambda _: dict(self.states or {}))
            for name, each in stages.items():
                each.sleep = ModelSleep(each.deployments(), states, self.facts, name, self.meter)
        return stages

    def close(self) -> None:
        if self._opened is not None:
            self._opened[0].close()
            self._opened = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = await self.open()
        await app(scope, receive, send)

    def client(self, **arguments: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", **arguments)

    async def post(self, path: str, **arguments: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, **arguments)


async def until(happened: Callable[[], bool]) -> None:
    """Let others work until it has happened."""
    for _ in range(1000):
        if happened():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server in this process, which runs no jobs."""
    server = Server(folder)
    try:
        yield server
    finally:
        server.close()
