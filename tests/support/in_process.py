"""The ingress in this process: the real application and routes, with stages that make pictures at once."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray.serve.context
from PIL import Image

from deployments.messages import GenerationRequest, Media, MediaFile, StageDescription
from env_config.variables import EnvConfig
from serve_app.api_keys import ApiKeys
from serve_app.http.middleware.limits import RequestLimits
from serve_app.ingress import Ingress, IngressArgs, app
from serve_app.jobs.service import JobArgs
from serve_app.making.admission import Admission, AdmissionArgs
from serve_app.making.layers.sharing import SharedGenerations
from serve_app.making.layers.signing import make_signer
from serve_app.requests.input_pictures import PictureRules
from serve_app.storage.local import LocalStorage

IngressClass = Ingress.func_or_class.__mro__[1]  # as it is written, without Serve's wrapper

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


def picture(width: int = 32, height: int = 32, format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(file, format)
    return file.getvalue()


async def make_at_once(request: GenerationRequest) -> Media:
    """In place of the stages: one picture of the size that was asked for."""
    await asyncio.sleep(0)
    width, height = request.arguments.get("width", 32), request.arguments.get("height", 32)
    data = picture(width, height, request.output.format)
    file = MediaFile(data, f"image/{request.output.format}", width, height)
    return Media((file,), {"denoise": 0.02, "denoiser_forwards": 0.01, "decode": 0.001, "encode_media": 0.001})


class Server:
    """The application as a client reaches it; `requests` are those that came as far as the stages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[GenerationRequest] = []
        self.make: Callable[..., Any] = make_at_once
        self.ingress: Any = object.__new__(IngressClass)
        self.configure()

    def configure(self, describing: StageDescription = TEXT_TO_IMAGE, **changes: Any) -> None:
        """Start again with these arguments of the application."""
        args = IngressArgs(
            **{
                "model_name": "flux",
                "default_arguments": {},
                "limits": RequestLimits(),
                "output_directory": self.folder,
                "public_url": None,
                "url_style": "path",
                "admission": AdmissionArgs(),
                "api_keys_file": None,
                "cors_origins": (),
                "remote_images": False,
                "private_targets": False,
                "c2pa_certificate": None,
                "c2pa_private_key": None,
                "jobs": JobArgs(),
                **changes,
            }
        )
        self.ingress.args = args
        self.ingress.env = EnvConfig()
        self.ingress.stages = SimpleNamespace(deployments=dict)  # none of them is missing
        self.ingress._generate_one = self._generate_one
        self.ingress.signer = make_signer(args.c2pa_certificate, args.c2pa_private_key)
        self.ingress.shared = SharedGenerations(
            self._generate_one if self.ingress.signer is None else self.ingress._generate_signed
        )
        self.ingress.started = int(time.time())
        self.ingress.admission = Admission(args.admission)
        self.ingress.pictures = PictureRules(args.limits, args.remote_images, args.private_targets)
        self.ingress.api_keys = ApiKeys(args.api_keys_file) if args.api_keys_file else None
        self.ingress.description = describing
        self.ingress.storage = LocalStorage(self.folder)

    async def _generate_one(self, request: GenerationRequest, *hooks: Any, on_preview: Any = None) -> Media:
        self.requests.append(request)
        for step in range(1, request.previews + 1):
            on_preview(step, await make_at_once(request))
        made: Media = await self.make(request)
        return made

    def client(self, **arguments: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
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
    """A server in this process, which Serve's functions take for a replica."""
    server = Server(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.serve.context, "_INTERNAL_REPLICA_CONTEXT", _ReplicaContext(server.ingress))
        yield server


class _ReplicaContext:
    def __init__(self, servable_object: Any) -> None:
        self.servable_object = servable_object
