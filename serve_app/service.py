"""The one composition root: `open_service` makes all that an ingress replica works with, and hands it on."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from deployments.adapters.args import Adapter
from deployments.adapters.use import FEATURE, use_of
from deployments.errors import ModelNotFoundError, NotSupportedError
from deployments.messages import GenerationRequest, StageDescription
from deployments.metrics.meter import NO_METER, Meter
from deployments.metrics.table import OF_THE_INGRESS
from env_config.secret import SecretPath
from env_config.variables import EnvConfig
from serve_app.adapters.adapters import Adapters
from serve_app.adapters.configured import check_arguments, check_configured
from serve_app.adapters.names import AdapterName, adapter_in
from serve_app.adapters.places import AdapterPlace
from serve_app.adapters.records import ServedAdapter
from serve_app.adapters.store import AdapterStore
from serve_app.api_keys import ApiKeys
from serve_app.deadlines import NO_LIMITS, TimeLimits
from serve_app.errors import AdapterNotFoundError, ConflictError, JobNotFoundError, ObjectNotFoundError
from serve_app.jobs.service import JobArgs, Jobs
from serve_app.jobs.webhooks.delivery import WebhookRules
from serve_app.making.admission import Admission, AdmissionArgs
from serve_app.making.at_once import MakeAtOnce
from serve_app.making.follower import Follower
from serve_app.making.generate import generate
from serve_app.making.layers import LAYERS, Layer, LayerContext, wrapped
from serve_app.making.served_model import ServedModel
from serve_app.making.stages import Stages
from serve_app.public_address import HostPattern, Origin, ProxyNetwork, PublicURL
from serve_app.requests.bodies import MediaBody
from serve_app.requests.effects import KnownEffects
from serve_app.requests.given.references import EarlierOutput
from serve_app.requests.given.sources import FileSource
from serve_app.requests.input_pictures import PictureRules
from serve_app.requests.limits import RequestLimits
from serve_app.requests.loras import AskedAdapter, asked_adapters
from serve_app.requests.parse import parse
from serve_app.storage.base import StorageBackend, URLStyle
from serve_app.storage.guarded import GuardedStorage
from serve_app.storage.s3 import S3Args
from serve_app.storage.spool import SpooledStorage, SpoolUploads
from serve_app.storage.table import make_storage

logger = logging.getLogger(__name__)

TELLING_S = 5.0  # between two looks at what there is, for the metrics; Ray passes them on every 10 s


class ServiceArgs(BaseModel):
    """The arguments of the application that the ingress works by."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model_name: str | None = Field(None, description="the name that callers use; default: the last part of `model`")
    model_aliases: tuple[str, ...] = Field(
        (), description="more names that callers may use, such as gpt-image-1 for clients that know no other"
    )
    default_arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the pipeline's call that a request may override"
    )
    quality: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict,
        description="levels of OpenAI's `quality` and the arguments of each, such as `low: {num_inference_steps: 4}`",
    )
    adapters: dict[AdapterName, Adapter] = Field(
        default_factory=dict,
        description="LoRAs that requests may name: a path, or `{path, weight_name, scale, preload}`, by name",
    )
    adapter_places: tuple[AdapterPlace, ...] = Field(
        (),
        description="where POST /v1/loras may load from: folders, s3://bucket/prefix, owners or repositories of the "
        "hub; none by default",
    )
    adapter_keys: tuple[str, ...] = Field(
        (), description="labels of api_keys_file whose keys may add and delete LoRAs; empty: all"
    )
    limits: RequestLimits = Field(default_factory=RequestLimits, description="what a request may ask for at most")
    output_directory: Path | None = Field(
        None, description="where outputs are stored without S3; default: outputs/ below the cache root"
    )
    public_url: PublicURL | None = Field(
        None,
        description="the address callers reach, with the route prefix, for the URLs of stored outputs; default: the "
        "address of each request",
    )
    allowed_hosts: tuple[HostPattern, ...] = Field(
        (),
        description="hosts that this server answers to besides loopback, addresses and public_url: example.com, "
        "*.example.com, or * for any; with api_keys_file and none given: any",
    )
    trusted_proxies: tuple[ProxyNetwork, ...] = Field(
        (), description="addresses of proxies whose Forwarded or X-Forwarded-Host and -Proto are believed: 10.0.0.0/8"
    )
    url_style: URLStyle = Field("presigned", description="URLs of outputs in S3: presigned, public, or path")
    s3: S3Args = Field(default_factory=S3Args, description="how the bucket of S3 is reached, and its URLs")
    admission: AdmissionArgs = Field(
        default_factory=AdmissionArgs, description="how much may wait in an ingress replica before it answers 429"
    )
    api_keys_file: SecretPath | None = Field(
        None, description="lines of `python -m serve_app.tools.keys new LABEL`; without it no key is asked for"
    )
    cors_origins: tuple[Origin, ...] = Field(
        (), description="origins of web pages that may call this server, such as https://example.com; none by default"
    )
    playground: bool = Field(True, description="a page at `/` to make pictures in a browser and to watch the cluster")
    remote_images: bool = Field(False, description="fetch pictures that callers give as http(s) URLs")
    c2pa_certificate: Path | None = Field(
        None, description="PEM: the signer's certificate and those between it and its root; outputs get a C2PA manifest"
    )
    c2pa_private_key: SecretPath | None = Field(
        None, description="PEM: the key of c2pa_certificate, without a password"
    )
    private_targets: bool = Field(
        False, description="callers' URLs (pictures, webhooks) may lead to this machine and private networks"
    )
    jobs: JobArgs = Field(default_factory=JobArgs, description="how jobs (videos, requests in the background) are kept")

    @model_validator(mode="after")
    def check_adapters(self) -> Self:
        """Raises ValueError."""
        if self.adapter_keys and self.api_keys_file is None:
            raise ValueError("adapter_keys is of no effect without api_keys_file")
        names = [name for name in (self.model_name, *self.model_aliases) if name]
        check_configured(self.adapters, names, self.limits)
        levels = [(f"quality.{level}", arguments) for level, arguments in self.quality.items()]
        check_arguments([("default_arguments", self.default_arguments), *levels])
        return self

    @model_validator(mode="after")
    def check_that_urls_have_the_endpoint(self) -> Self:
        """Raises ValueError for a public endpoint that no URL would have."""
        if self.s3.public_endpoint is not None and self.url_style == "path":
            raise ValueError("s3.public_endpoint is of no effect with url_style: path, whose URLs have public_url")
        return self


@dataclass(frozen=True)
class Service:
    """What the routes work with; a replica of the ingress has one."""

    args: ServiceArgs
    env: EnvConfig
    model: ServedModel
    stages: Stages
    admission: Admission
    at_once: MakeAtOnce
    jobs: Jobs
    adapters: Adapters
    storage: StorageBackend
    pictures: PictureRules
    effects: KnownEffects
    keys: ApiKeys | None
    _loops: list[asyncio.Task[None]] = field(default_factory=list, repr=False)

    @property
    def meter(self) -> Meter:
        """Takes what this process measures."""
        return self.stages.meter

    async def parse(
        self,
        body: MediaBody,
        caller: str,
        request_id: str | None = None,
        limits: TimeLimits = NO_LIMITS,
    ) -> list[GenerationRequest]:
        """The requests that a body of `caller` stands for. Raises InvalidRequestError that names the field at fault."""
        of_model = await self.adapter_in(body.model)
        description = await self.model.describe()
        loras = await self._loras(body, of_model, description)
        body = body.model_copy(update={"model": None})  # an alias is no other model
        return await parse(
            body,
            description,
            FileSource(self.pictures, lambda earlier, field: self._read_earlier(earlier, caller, field)),
            self.model.name,
            self.model.default_arguments,
            self.model.quality,
            self.effects,
            request_id,
            limits.shortest_s,
            loras,
        )

    async def adapter_in(self, model: str | None) -> ServedAdapter | None:
        """The LoRA of MODEL:LORA; None where the model alone is meant. Raises ModelNotFoundError."""
        name = adapter_in(model, self.model.names)
        if name is None:
            self.model.check_name(model)
            return None
        try:
            return await self.adapters.get(name, "model")
        except AdapterNotFoundError as error:
            raise ModelNotFoundError(error.message) from error

    async def _loras(
        self, body: MediaBody, of_model: ServedAdapter | None, description: StageDescription
    ) -> list[dict[str, Any]]:
        """What the stages are told of the LoRAs that a body names. Raises InvalidRequestError, NotFoundError."""
        if body.loras and not description.takes_adapters:
            body.refuse(NotSupportedError(f"loras is not supported: {description.pipeline_class} takes none", "loras"))
        asked = asked_adapters(body, of_model.name if of_model else None, self.args.limits)
        return await self.adapters.uses(asked)

    async def renewed(self, request: GenerationRequest) -> GenerationRequest:
        """The request with its LoRAs as their names stand today. Raises AdapterNotFoundError for one that is gone."""
        earlier = [use_of(plain) for plain in request.features.get(FEATURE, ())]
        if not earlier:
            return request
        uses = await self.adapters.uses([AskedAdapter(use.name, use.scale) for use in earlier])
        return replace(request, features=request.features | {FEATURE: uses})

    async def _read_earlier(self, earlier: EarlierOutput, caller: str, field: str) -> bytes:
        """The file that `field` names. Raises NotFoundError, ConflictError, StorageError."""
        key = earlier.file_id or await self._key_of_output(earlier, caller, field)
        try:
            data, _ = await self.storage.load(key)
        except ObjectNotFoundError as error:
            raise ObjectNotFoundError(f"{field}: there is no file {key[:200]!r} here", field) from error
        return data

    async def _key_of_output(self, earlier: EarlierOutput, caller: str, field: str) -> str:
        try:
            job = await self.jobs.get(earlier.id, caller)
        except JobNotFoundError as error:
            raise JobNotFoundError(f"{field}: there is no job {earlier.id[:96]!r}", field) from error
        if job.status != "completed":
            raise ConflictError(f"{field}: {job.id!r} cannot be used, it is {job.status}", field, "output_not_ready")
        if earlier.index >= len(job.outputs):
            raise JobNotFoundError(f"{field}: {job.id!r} has {len(job.outputs)} files, from 0", field)
        return job.outputs[earlier.index].key

    def start(self) -> None:
        """Begin to run jobs and to upload what waits in the spool; from the event loop."""
        self.jobs.start()
        self._loops.append(asyncio.create_task(self._keep_telling()))
        if isinstance(self.storage, SpooledStorage):
            self._loops.append(asyncio.create_task(SpoolUploads(self.storage, self.jobs.mark_uploaded).run()))

    async def _keep_telling(self) -> None:
        """What there is at this moment, to the meter, again and again."""
        for area in OF_THE_INGRESS:
            self.meter.begin(area)
        while True:
            try:
                await self.tell()
            except Exception:  # if this ended, the metrics would stand still in a replica that looks healthy
                logger.exception("what there is could not be told to the metrics; trying again")
            await asyncio.sleep(TELLING_S)

    async def tell(self) -> None:
        """What there is at this moment, to the meter."""
        self.meter.set("triptych_model_info", 1, model=self.model.name)
        for name in self.stages.deployments():
            self.meter.set("triptych_stages_wanted", 1, target=name)
        self.admission.tell()
        await self.jobs.tell()
        if isinstance(self.storage, SpooledStorage):
            await self.storage.tell()
        elif isinstance(self.storage, GuardedStorage):
            self.storage.tell()

    def close(self) -> None:
        """Give the jobs back, so that others go on with them at once; a second time is of no effect."""
        for task in self._loops:
            task.cancel()
        self.adapters.close()
        self.jobs.close()


async def open_service(
    args: ServiceArgs, env: EnvConfig, stages: Stages, application: str, layers: tuple[Layer, ...] = LAYERS
) -> Service:
    """`application` is Serve's name of it: jobs and spooled outputs belong to it, whatever model it serves.

    Raises what says which argument or variable to correct: StorageError, JobStoreError, ProvenanceError, SecretError,
    ValueError.
    """
    model = ServedModel(args.model_name or "", stages, args.default_arguments, args.quality, args.model_aliases)
    admission = Admission(args.admission, stages.meter)
    stages.take_refused = admission.take_refused
    keys = ApiKeys(args.api_keys_file) if args.api_keys_file else None
    storage = await open_storage(args, env, application, stages.meter)
    context = LayerContext(env, stages, model, args.c2pa_certificate, args.c2pa_private_key)

    async def through_the_stages(request: GenerationRequest, follower: Follower) -> Any:
        return await generate(stages, request, follower)

    make = wrapped(through_the_stages, context, layers)
    webhooks = WebhookRules(allow_private=args.private_targets)
    jobs = Jobs(
        args.jobs,
        env.runtime.cache_root,
        application,
        make,
        storage,
        admission,
        model.describe,
        webhooks,
        model.name,
        stages.meter,
    )
    adapters = Adapters(
        args.adapters,
        args.adapter_places,
        AdapterStore(jobs.database, application, model.name),
        stages,
        args.limits,
    )
    return Service(
        args=args,
        env=env,
        model=model,
        stages=stages,
        admission=admission,
        at_once=MakeAtOnce(make, admission, model),
        jobs=jobs,
        adapters=adapters,
        storage=storage,
        effects=KnownEffects(model.effects),
        pictures=PictureRules(args.limits, args.remote_images, args.private_targets),
        keys=keys,
    )


async def open_storage(args: ServiceArgs, env: EnvConfig, application: str, meter: Meter = NO_METER) -> StorageBackend:
    """The configured storage, behind a spool where it is on another machine; raises StorageError unless it works."""
    cache_root, cloud = env.runtime.cache_root, env.cloud_storage
    if args.s3 != S3Args() and cloud.type != "s3":
        raise ValueError("s3: its settings are of no effect unless SGLANG_CLOUD_STORAGE_TYPE is s3")
    folder = args.output_directory or cache_root / "outputs"
    backend = make_storage(cloud, folder, args.public_url, args.url_style, args.s3)
    storage: StorageBackend
    if backend.is_shared:
        place = f"{cloud.endpoint_url} {cloud.bucket_name} {cloud.region_name}"
        spools, name = cache_root / "spool", quote(application, safe="")
        storage = SpooledStorage(
            backend, spools / name, args.public_url or "", place,
            lambda: [each for each in spools.iterdir() if each.name.startswith(f"{name}%2F")], meter,
        )  # fmt: skip
    else:
        storage = GuardedStorage(backend, meter=meter)
    await storage.check()
    return storage
