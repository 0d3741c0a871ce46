"""The deployment `Ingress`: OpenAI's images API (and a synchronous video route) over HTTP.

Each route reads: parse, generate, store, respond. Serve pickles the app while this module is being
imported, so what the routes use is imported or defined above the class, and annotations are evaluated.
"""

import asyncio
import base64
import logging
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ray
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.errors import ModelNotFoundError, StageUnavailableError
from deployments.messages import Checkpoint, GenerationRequest, Media, MediaFile, StageDescription
from deployments.observability.logging_setup import apply_logging_level
from env_config.variables import EnvConfig
from serve_app.api_keys import ApiKeys
from serve_app.http.errors import install_error_handlers
from serve_app.http.image_streaming import (
    PartialPictures,
    StreamPrefix,
    picture_events,
    refuse_partial_images,
    without_stream,
)
from serve_app.http.middleware.cors import CrossOrigin
from serve_app.http.middleware.keys import RequireApiKey
from serve_app.http.middleware.limits import SERVE_MAX_ONGOING_REQUESTS, BodySizeLimit, RequestLimits, RoomForRequests
from serve_app.http.middleware.prefix import KnowRoutePrefix
from serve_app.http.middleware.timing import AnswerHeaders, count_compute
from serve_app.http.openapi import describe_truly
from serve_app.http.routes.dev import dev_routes
from serve_app.http.routes.images import AT_ONCE_OR_STREAMED, check_generation
from serve_app.http.routes.images import router as image_routes
from serve_app.http.routes.jobs import answer_by_job
from serve_app.http.routes.jobs import router as job_routes
from serve_app.http.routes.models import router as model_info_routes
from serve_app.http.routes.video_edits import router as video_edit_routes
from serve_app.http.routes.videos import router as video_routes
from serve_app.jobs.service import JobArgs, Jobs
from serve_app.jobs.webhooks import WebhookRules
from serve_app.making.admission import Admission, AdmissionArgs, Ticket
from serve_app.making.generate import OnCheckpoint, OnPreview, OnProgress, Stages, generate
from serve_app.making.health import describe_stages, read_health
from serve_app.making.layers.request_log import RequestLog
from serve_app.making.layers.sharing import SharedGenerations
from serve_app.making.layers.signing import make_signer
from serve_app.requests.bodies import (
    GeneratedItem,
    ImageGenerationBody,
    ImagesAnswer,
    ModelCard,
    ModelList,
    VideoGenerationBody,
    VideosAnswer,
)
from serve_app.requests.input_pictures import PictureRules, with_pictures
from serve_app.requests.translate import to_generation_requests
from serve_app.storage.base import StorageBackend, URLStyle
from serve_app.storage.keys import object_key
from serve_app.storage.spool import SpooledStorage, SpoolUploads
from serve_app.storage.table import make_storage

logger = logging.getLogger(__name__)

app = FastAPI(
    title="Triptych", description="Diffusion models on Ray Serve, spoken to as OpenAI's API.", version="0.1.0"
)
install_error_handlers(app)
describe_truly(app)
# The last is the outermost.
for middleware in (BodySizeLimit, RequireApiKey, RoomForRequests, CrossOrigin, AnswerHeaders, KnowRoutePrefix):
    app.add_middleware(middleware)
for router in (image_routes, video_routes, video_edit_routes, job_routes, model_info_routes, dev_routes):
    app.include_router(router)


class IngressArgs(BaseModel):
    """What the ingress needs to know of the application's arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_name: str
    default_arguments: dict[str, Any]
    limits: RequestLimits
    output_directory: Path | None
    public_url: str | None
    url_style: URLStyle
    admission: AdmissionArgs
    api_keys_file: Path | None
    cors_origins: tuple[str, ...]
    jobs: JobArgs
    remote_images: bool
    private_targets: bool
    c2pa_certificate: Path | None
    c2pa_private_key: Path | None


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=SERVE_MAX_ONGOING_REQUESTS,
    health_check_period_s=2,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress(app)
class Ingress:
    """One replica of the ingress; it holds handles and no tensors."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: IngressArgs, encoder: DeploymentHandle, denoiser: DeploymentHandle, vae: DeploymentHandle
    ) -> None:
        self.args = args
        self.env = EnvConfig.from_environ()
        apply_logging_level(self.env.runtime.logging_level)
        self.admission = Admission(args.admission)
        owner = ray.get_runtime_context().get_actor_name() or ""
        self.stages = Stages(encoder, denoiser, vae, owner, self.admission.take_refused)
        self.request_log: RequestLog | None = None
        if self.env.runtime.stage_logging:
            self.request_log = RequestLog(self.env.runtime.cache_root, self.stages)
        self.started = int(time.time())
        self.pictures = PictureRules(args.limits, args.remote_images, args.private_targets)
        self.signer = make_signer(args.c2pa_certificate, args.c2pa_private_key)
        self.api_keys = ApiKeys(args.api_keys_file) if args.api_keys_file else None
        self.description: StageDescription | None = None
        folder = args.output_directory or self.env.runtime.cache_root / "outputs"
        self.storage: StorageBackend = make_storage(
            self.env.cloud_storage, folder, args.public_url, url_style=args.url_style
        )
        context = serve.get_replica_context()
        application = f"{context.app_name}/{args.model_name}"
        cache_root = self.env.runtime.cache_root
        if self.storage.is_shared:
            spool = cache_root / "spool" / quote(application, safe="")
            cloud = self.env.cloud_storage
            place = f"{cloud.endpoint_url} {cloud.bucket_name} {cloud.region_name}"
            self.storage = SpooledStorage(self.storage, spool, args.public_url or "", place)
        await self.storage.check()  # a replica that cannot store what it makes does not start
        self.shared = SharedGenerations(self._generate_one if self.signer is None else self._generate_signed)
        self.jobs = Jobs(
            args.jobs,
            cache_root,
            application,
            self.shared.generate,
            self.storage,
            self.admission,
            self.describe,
            WebhookRules(allow_private=args.private_targets),
        )
        self.jobs.start()
        if isinstance(self.storage, SpooledStorage):
            self.uploads = asyncio.create_task(SpoolUploads(self.storage, self.jobs.mark_uploaded).run())

    def __del__(self) -> None:
        """Serve calls it when the replica is stopped: its jobs go to others at once."""
        if hasattr(self, "jobs"):
            self.jobs.close()

    @app.post("/v1/images/generations", response_model=ImagesAnswer, responses=AT_ONCE_OR_STREAMED)
    async def create_images(self, request: Request, body: ImageGenerationBody) -> ImagesAnswer | Response:
        """Pictures from a prompt, made by as many parallel generations as `n` says."""
        check_generation(body, await self.describe())
        return await self.answer_images(request, body, "image_generation")

    @app.post("/v1/videos/generations", response_model=VideosAnswer)
    async def create_videos(self, request: Request, body: VideoGenerationBody) -> ImagesAnswer | Response:
        """A video from a prompt; the answer comes when it is made."""
        if (answer := await answer_by_job(self, request.url.path, body, request.headers)) is not None:
            return answer
        refuse_partial_images(body)
        requests = await self.parse(body)
        media = await self._generate(requests)
        items = await self._items(body.response_format, requests, media)
        return VideosAnswer.of(items, requests, media)

    @app.get("/v1/files/{key:path}")
    async def read_file(self, key: str) -> Response:
        """A stored output."""
        data, content_type = await self.storage.load(key)
        return Response(data, media_type=content_type)

    @app.get("/v1/models")
    async def list_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id=self.args.model_name, created=self.started)])

    @app.get("/v1/models/{model}")
    async def read_model(self, model: str) -> ModelCard:
        self._check_model(model)
        return ModelCard(id=self.args.model_name, created=self.started)

    @app.get("/health")
    async def health(self) -> JSONResponse:
        """200 when every stage can serve, else 503 with what is missing."""
        content = await read_health(self.stages)
        return JSONResponse(content, status_code=503 if content["missing"] else 200)

    async def answer_images(
        self, request: Request, body: ImageGenerationBody, prefix: StreamPrefix
    ) -> ImagesAnswer | Response:
        """The answer to generations and edits: at once, with `stream` as events, or as a job."""
        if (answer := await answer_by_job(self, prefix, body, request.headers)) is not None:
            return answer
        if body.stream:
            requests = await self.parse(without_stream(body))
            partials = PartialPictures()
            tasks = self._start(requests, await self.describe(), self.storage.is_shared, partials)
            return StreamingResponse(picture_events(prefix, tasks, partials), media_type="text/event-stream")
        refuse_partial_images(body)
        requests = await self.parse(body)
        media = await self._generate(requests)
        items = await self._items(body.response_format, requests, media)
        return ImagesAnswer.of(items, requests, media)

    async def parse(
        self, body: ImageGenerationBody | VideoGenerationBody, request_id: str | None = None
    ) -> list[GenerationRequest]:
        """The requests that a body stands for, their pictures at hand; raises what names the field at fault."""
        self._check_model(body.model)
        description = await self.describe()
        body = await with_pictures(body, self.pictures)
        request_id = request_id or uuid.uuid4().hex
        return to_generation_requests(
            body, description, self.args.limits, request_id, self.args.model_name, self.args.default_arguments
        )

    async def _generate(self, requests: list[GenerationRequest]) -> list[Media]:
        tasks = self._start(requests, await self.describe())
        try:
            media = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()  # of no effect on those that are done
        count_compute(media)
        return media

    def _start(
        self,
        requests: list[GenerationRequest],
        description: StageDescription,
        keep: bool = False,
        partials: PartialPictures | None = None,
    ) -> dict[asyncio.Task[Media], GenerationRequest]:
        """A task for each request, all let in or none; with `keep` their files are stored too."""
        tasks = {}
        for request, ticket in zip(requests, self.admission.admit(requests, description), strict=True):
            task = asyncio.ensure_future(self._make(request, ticket, keep, partials))
            task.add_done_callback(ticket.close)
            tasks[task] = request
        return tasks

    async def _make(
        self, request: GenerationRequest, ticket: Ticket, keep: bool, partials: PartialPictures | None
    ) -> Media:
        on_preview = partial(partials.add, request) if partials is not None else None
        media = await self.shared.generate(request, on_preview=on_preview)
        ticket.learn(media)
        if keep:
            for index, file in enumerate(media.files):
                await self._store(request, index, file)
        return media

    async def _generate_one(
        self,
        request: GenerationRequest,
        on_progress: OnProgress | None = None,
        on_checkpoint: OnCheckpoint | None = None,
        resume_from: Checkpoint | None = None,
        on_preview: OnPreview | None = None,
    ) -> Media:
        work = generate(self.stages, request, on_progress, on_checkpoint, resume_from, on_preview)
        if self.request_log is None:
            return await work
        async with self.request_log.record(request) as record:
            record.media = await work
            return record.media

    async def _generate_signed(self, request: GenerationRequest, *how: Any, **named: Any) -> Media:
        assert self.signer is not None
        return await self.signer.signed(await self._generate_one(request, *how, **named), request)

    async def _items(
        self, response_format: str, requests: list[GenerationRequest], media: list[Media]
    ) -> list[GeneratedItem]:
        """One item a file: with its bytes, or stored and with its URL."""
        items = []
        for request, made in zip(requests, media, strict=True):
            for index, file in enumerate(made.files):
                url = None
                if response_format == "url" or self.storage.is_shared:
                    url = await self._store(request, index, file)
                content = base64.b64encode(file.data).decode() if response_format == "b64_json" else None
                items.append(GeneratedItem(b64_json=content, url=url, seed=request.seed))
        return items

    async def _store(self, request: GenerationRequest, index: int, file: MediaFile) -> str:
        key = object_key(request, index, file.mime_type)
        metadata = {"model": request.model, "seed": str(request.seed), "request-id": request.request_id}
        stored = await self.storage.store(key, file.data, file.mime_type, metadata)
        return stored.url

    async def describe(self) -> StageDescription:
        if self.description is None:
            answers = await describe_stages(self.stages)
            answer = answers[self.stages.encoder.deployment_name]
            if isinstance(answer, str):
                raise StageUnavailableError(f"the model is not ready: {answer}")
            self.description = answer
        return self.description

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.args.model_name:
            raise ModelNotFoundError(
                f"The model {model[:80]!r} is not served here; this server has {self.args.model_name!r}"
            )
