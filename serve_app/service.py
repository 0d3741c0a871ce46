"""The one composition root: `open_service` makes all that an ingress replica works with, and hands it on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from pydantic import Field, model_validator

from deployments.messages import GenerationRequest
from deployments.metrics.meter import NO_METER, Meter
from deployments.metrics.table import OF_THE_INGRESS
from env_config.secret import SecretPath
from env_config.variables import EnvConfig
from serve_app.adapters.adapters import Adapters
from serve_app.adapters.places import AdapterPlace
from serve_app.adapters.store import AdapterStore
from serve_app.api_keys import ApiKeys
from serve_app.jobs.service import JobArgs, Jobs
from serve_app.jobs.webhooks.delivery import WebhookRules
from serve_app.making.admission import Admission
from serve_app.making.at_once import MakeAtOnce
from serve_app.making.follower import Follower
from serve_app.making.generate import generate
from serve_app.making.layers import LAYERS, Layer, LayerContext, wrapped
from serve_app.making.served_model import ServedModel
from serve_app.making.stages import Stages
from serve_app.models.args import Alias, Purpose, ServedModelArgs, check_names
from serve_app.models.earlier_outputs import EarlierOutputs
from serve_app.models.registry import ServedModels
from serve_app.models.service import ModelService
from serve_app.public_address import HostPattern, Origin, ProxyNetwork, PublicURL
from serve_app.requests.effects import KnownEffects
from serve_app.requests.input_pictures import PictureRules
from serve_app.storage.base import StorageBackend, URLStyle
from serve_app.storage.guarded import GuardedStorage
from serve_app.storage.s3 import S3Args
from serve_app.storage.spool import SpooledStorage, SpoolUploads
from serve_app.storage.table import make_storage

logger = logging.getLogger(__name__)

TELLING_S = 5.0  # between two looks at what there is, for the metrics; Ray passes them on every 10 s


class ServiceArgs(ServedModelArgs):
    """The arguments of the application that the ingress works by: of its one model, or of several in `models`."""

    model_name: Alias | None = Field(None, description="the name that callers use; default: the last part of `model`")
    model_aliases: tuple[Alias, ...] = Field(
        (), description="more names that callers may use, such as gpt-image-1 for clients that know no other"
    )
    models: Mapping[str, ServedModelArgs] = Field(
        default_factory=dict,
        description="several models behind this endpoint, by the names that callers use: each has what stands at the "
        "top of `args` for one (`model`, `placement`, `limits` ...)",
    )
    aliases: dict[Alias, str] = Field(
        default_factory=dict, description="more names of `models`, such as `gpt-image-1: flux`"
    )
    defaults: dict[Purpose, str] = Field(
        default_factory=dict,
        description="which of `models` makes what (image, edit, video, audio, tensors) where a request names none; "
        "default: the first that can",
    )
    adapter_places: tuple[AdapterPlace, ...] = Field(
        (),
        description="where POST /v1/loras may load from: folders, s3://bucket/prefix, owners or repositories of the "
        "hub; none by default",
    )
    adapter_keys: tuple[str, ...] = Field(
        (), description="labels of api_keys_file whose keys may add and delete LoRAs; empty: all"
    )
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

    @property
    def served(self) -> Mapping[str, ServedModelArgs]:
        """The models by name: those of `models`, or the one that the arguments at the top are of."""
        return self.models or {self.model_name or "": self}

    @property
    def names(self) -> Mapping[str, str]:
        """The aliases, each with the name of its model."""
        own = self.model_name or ""
        return self.aliases | {alias: own for alias in self.model_aliases if alias != own}

    @model_validator(mode="after")
    def check_keys(self) -> Self:
        """Raises ValueError."""
        if self.api_keys_file is None:
            for name, given in (("adapter_keys", self.adapter_keys), *model_keys_in(self.served)):
                if given:
                    raise ValueError(f"{name} is of no effect without api_keys_file")
        return self

    @model_validator(mode="after")
    def check_models(self) -> Self:
        """Raises ValueError for what belongs to one model beside several, and the other way round."""
        if self.models:
            refuse_at_the_top(self.model_fields_set, ServedModelArgs.model_fields)
        for name in () if self.models else ("aliases", "defaults"):
            if getattr(self, name):
                raise ValueError(f"{name} is for `models`: one model has model_name and model_aliases")
        check_names(self.served, self.names, self.defaults)
        return self

    @model_validator(mode="after")
    def check_that_urls_have_the_endpoint(self) -> Self:
        """Raises ValueError for a public endpoint that no URL would have."""
        if self.s3.public_endpoint is not None and self.url_style == "path":
            raise ValueError("s3.public_endpoint is of no effect with url_style: path, whose URLs have public_url")
        return self


def refuse_at_the_top(given: Collection[str], of_each: Iterable[str]) -> None:
    """Raises ValueError for an argument of one model beside several."""
    instead = {"model_name": "the names are there", "model_aliases": "say `aliases: {NAME: MODEL}`"}
    for name in (*instead, *of_each):
        if name in given:
            where = instead.get(name, f"give it to each of them, as models.NAME.{name}")
            raise ValueError(f"{name} is of no effect beside models: {where}")


def model_keys_in(models: Mapping[str, ServedModelArgs]) -> list[tuple[str, tuple[str, ...]]]:
    """Where `model_keys` stand, and what they are."""
    places = {name: f"models.{name}.model_keys" for name in models} if len(models) > 1 else {}
    return [(places.get(name, "model_keys"), model.model_keys) for name, model in models.items()]


@dataclass(frozen=True)
class Service:
    """What the routes work with; a replica of the ingress has one."""

    args: ServiceArgs
    env: EnvConfig
    meter: Meter  # takes what this process measures
    models: ServedModels
    jobs: Jobs
    storage: StorageBackend
    keys: ApiKeys | None
    _loops: list[asyncio.Task[None]] = field(default_factory=list, repr=False)

    def start(self) -> None:
        """Begin to run jobs and to upload what waits in the spool; from the event loop."""
        self.jobs.start()
        self._loops.append(asyncio.create_task(self._keep_telling()))
        if isinstance(self.storage, SpooledStorage):
            self._loops.append(asyncio.create_task(SpoolUploads(self.storage, self.jobs.mark_uploaded).run()))

    async def _keep_telling(self) -> None:
        """What there is at this moment, to the meter, again and again."""
        for area in OF_THE_INGRESS:
            self.meter.begin(area, model=tuple(self.args.served))
        while True:
            try:
                await self.tell()
            except Exception:  # if this ended, the metrics would stand still in a replica that looks healthy
                logger.exception("what there is could not be told to the metrics; trying again")
            await asyncio.sleep(TELLING_S)

    async def tell(self) -> None:
        """What there is at this moment, to the meter."""
        for model in self.models.all():
            self.meter.set("triptych_model_info", 1, model=model.name)
            model.admission.tell(model.name)
            await model.served.tell()
        await self.jobs.tell()
        if isinstance(self.storage, SpooledStorage):
            await self.storage.tell()
        elif isinstance(self.storage, GuardedStorage):
            self.storage.tell()

    def close(self) -> None:
        """Give the jobs back, so that others go on with them at once; a second time is of no effect."""
        for task in self._loops:
            task.cancel()
        for model in self.models.all():
            model.adapters.close()
        self.jobs.close()


async def open_service(
    args: ServiceArgs,
    env: EnvConfig,
    stages: Mapping[str, Stages],
    application: str,
    layers: tuple[Layer, ...] = LAYERS,
) -> Service:
    """`stages` are those of each model, by its name. `application` is Serve's name of it: jobs and spooled outputs
    belong to it, whatever models it serves.

    Raises what says which argument or variable to correct: StorageError, JobStoreError, ProvenanceError, SecretError,
    ValueError.
    """
    keys = ApiKeys(args.api_keys_file) if args.api_keys_file else None
    meter = meter_of(stages)
    storage = await open_storage(args, env, application, meter)
    making = {name: making_of(name, args, env, stages[name], layers) for name in args.served}
    webhooks = WebhookRules(allow_private=args.private_targets)
    jobs = Jobs(args.jobs, env.runtime.cache_root, application, making, storage, webhooks, meter)
    earlier = EarlierOutputs(jobs, storage)
    models = [
        ModelService(
            at_once=making[name],
            adapters=Adapters(
                model.adapters,
                args.adapter_places,
                AdapterStore(jobs.database, application, name),
                stages[name],
                model.limits,
            ),
            pictures=PictureRules(model.limits, args.remote_images, args.private_targets),
            effects=KnownEffects(making[name].model.effects),
            read_earlier=earlier.read,
            keys=frozenset(model.model_keys),
        )
        for name, model in args.served.items()
    ]
    return Service(
        args=args,
        env=env,
        meter=meter,
        models=ServedModels(models, args.defaults),
        jobs=jobs,
        storage=storage,
        keys=keys,
    )


def meter_of(stages: Mapping[str, Stages]) -> Meter:
    """That of the process: the stages of all models have the same."""
    return next((each.meter for each in stages.values()), NO_METER)


def making_of(name: str, args: ServiceArgs, env: EnvConfig, stages: Stages, layers: tuple[Layer, ...]) -> MakeAtOnce:
    """How the model makes what it is asked for, with all layers around it."""
    its_own = args.served[name]
    aliases = tuple(alias for alias, model in args.names.items() if model == name)
    served = ServedModel(name, stages, its_own.default_arguments, its_own.quality, aliases)
    admission = Admission(its_own.admission, stages.meter)
    stages.take_refused = admission.take_refused
    stages.sleep.max_wait_s, stages.sleep.on_awake = its_own.sleep.max_wait_s, admission.begin_again
    context = LayerContext(env, stages, served, args.c2pa_certificate, args.c2pa_private_key)

    async def through_the_stages(request: GenerationRequest, follower: Follower) -> Any:
        return await generate(stages, request, follower)

    return MakeAtOnce(wrapped(through_the_stages, context, layers), admission, served)


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
