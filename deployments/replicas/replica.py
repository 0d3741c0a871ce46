"""The replica of every deployment: it reads the environment, builds its stages and does their work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import psutil
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import tracing
from deployments.adapters.use import AdapterUse, use_of
from deployments.device_memory import device_memory
from deployments.devices import DeviceProbe, select_device, synchronize
from deployments.engine.fiber import Fiber
from deployments.errors import OtherVersionError
from deployments.features import fields_of_features
from deployments.media.pool import MediaPool, workers_for
from deployments.messages import (
    UNFOLLOWED,
    ArgumentDescription,
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    DenoisingProgress,
    Effects,
    Envelope,
    GenerationRequest,
    Media,
    StageDescription,
    StageName,
)
from deployments.metrics.serve_meter import ServeMeter
from deployments.model import ModelArgs
from deployments.observability.logging_setup import apply_logging_level
from deployments.observability.observer import MakeObserver, ObservedReplica, Observers
from deployments.observability.stage_load import StageLoads
from deployments.observability.table import OBSERVERS
from deployments.replicas.adapter_routing import HELD
from deployments.replicas.autoscaling import autoscaling_stats
from deployments.replicas.dev import Inside, free_memory
from deployments.replicas.device_share import IdleMemory, claim_share
from deployments.replicas.fitness import Fitness, hangs
from deployments.replicas.metrics.adapters import AdapterMetrics
from deployments.replicas.metrics.denoiser import DenoiserMetrics
from deployments.replicas.metrics.device import DeviceMetrics
from deployments.replicas.metrics.media import MediaMetrics
from deployments.replicas.metrics.stages import StageMetrics
from deployments.replicas.other_stages import OtherStages
from deployments.replicas.owner_watch import OwnerWatch
from deployments.replicas.ranks import start_ranks
from deployments.replicas.split_check import check_split
from deployments.replicas.threads import StageThreads
from deployments.replicas.warm_up import WarmReplica, warm_up
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stages.adapters import (
    Brought,
    answer_with_adapters,
    brought,
    described,
    give_back_of_encoders,
    preload,
    uses_of,
    with_contents,
)
from deployments.stages.build import build_stages
from deployments.stages.decode import decode
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_stream import StreamItem, denoising_stream
from deployments.stages.effects import arguments_of, effects_of
from deployments.stages.encode import encode
from deployments.stages.ranks.beside import features_beside
from deployments.stages.ranks.vae_rank import spread_tiles
from deployments.stages.warm_up import warm_up_requests
from deployments.starting import tell_start
from env_config.library_caches import check_cache_root, set_allocator_settings, set_library_caches
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")


class StageReplica:
    """Does the work of one, two or all of the stages; `table.REPLICAS` says which there are.

    It asks the encoder stage once for each kind of request (to learn how such requests are batched), and the
    others in the denoising loop only for pipelines that need them there. A replica that cannot do what its
    variables or arguments say does not start: the constructor raises.

    `checked`: the stages of each process of the application, where the split is to be held against the unsplit
    pipeline before this replica loads anything. `also`: further models whose same stages are done here, each with the
    handles of its others; what of them is equal is held once. Requests say which model they mean.
    """

    def __init__(
        self,
        model: ModelArgs,
        stages: tuple[StageName, ...],
        others: Mapping[StageName, DeploymentHandle] | None = None,
        observers: Sequence[MakeObserver] = OBSERVERS,
        checked: tuple[tuple[StageName, ...], ...] = (),
        also: tuple[tuple[ModelArgs, Mapping[StageName, DeploymentHandle]], ...] = (),
    ) -> None:
        began_at = time.monotonic()
        self.env = EnvConfig.from_environ()
        runtime = self.env.runtime
        check_cache_root(runtime.cache_root)
        set_library_caches(runtime.cache_root)
        set_allocator_settings(runtime.target_device)
        apply_logging_level(runtime.logging_level)
        if checked:
            check_split(model, checked)
        # Before the device and the weights: see deployments/media/pool.py.
        self.media_pool = (
            MediaPool(runtime.worker_multiproc_method, workers_for(num_cpus()), model.watchdog.file_timeout_s)
            if "vae" in stages
            else None
        )
        self.device = select_device(runtime.target_device)
        share = claim_share(self.device, ray.get_runtime_context().get_assigned_resources(), model.fence_device_memory)
        replica_id = serve.get_replica_context().replica_id.unique_id
        # They load while this process does.
        self.ranks = start_ranks(model, self.device.name, stages)
        self.meter = ServeMeter()
        self._stage_metrics = StageMetrics(self.meter, stages)
        self._media_metrics = MediaMetrics(self.meter, self.media_pool) if self.media_pool else None
        rows = (lambda _: self._stage_metrics, *observers)
        self.observers = Observers(ObservedReplica(self.env, replica_id, stages, self.synchronize), rows)
        models = (model, *(each for each, _ in also))
        self.making = {each.name: each.making for each in models}
        self.stages = build_stages(models, stages, self.env, self.device, self.observers.wrap_kernel)
        self.stage = self.stages[model.name]
        for stage in self.stages.values():
            self.observers.install(stage.own_components)
        if self.ranks is not None and self.ranks.stage == "vae":
            spread_tiles(self.stage, self.ranks.group)
        self.description = described_together(self.stages, models, ray.get_runtime_context().get_node_id())
        self.threads = StageThreads(self.observers)
        self._owners = OwnerWatch()
        self._others = OtherStages(others or {}, model.making)
        self.denoiser = self._open_denoiser(model, can_ask=bool(others)) if "denoiser" in stages else None
        self.fitness = self._open_fitness(model)
        self._idle_memory = IdleMemory(self.device, share)
        self._device_metrics = DeviceMetrics(
            self.meter,
            stages,
            memory=lambda: device_memory(self.device),
            engine=self.denoiser.engine.statistics if self.denoiser else None,
        )
        self._inside = Inside(
            replica_id,
            self.env,
            self.device,
            self.description,
            self.observers,
            self.denoiser,
            self.media_pool,
            {name: stage.adapters for name, stage in self.stages.items()},
        )
        for each in models:
            for line in preload(self.stages[each.name], each):
                logger.info("%s", line)
        libraries = [stage.adapters for stage in self.stages.values()]
        self._adapter_metrics = AdapterMetrics(self.meter, stages, libraries)
        called = [(each, OtherStages(handles, each.making)) for each, handles in also]
        for each, handles in ((model, self._others), *called):
            self._warm_up(each, handles)
        self.description = replace(self.description, start_s=time.time() - psutil.Process().create_time())
        self._load_s = time.monotonic() - began_at
        logger.info("%s: %s on %s", "+".join(stages), self.description.weight_bytes, self.device.name)

    def _open_denoiser(self, model: ModelArgs, can_ask: bool) -> DenoiserStage:
        has_encoder = "encoder" in self.stage.stages
        return DenoiserStage(
            self.stage,
            model.denoising,
            ask_stage=(lambda stage, call: self._others.call_component(stage, replace(call, model=model.name)))
            if can_ask
            else None,
            encode=(lambda request: encode(self.stage, request)) if has_encoder else self._others.encode,
            env=self.env,
            measure=DenoiserMetrics(self.meter),
            features=features_beside(model),
            ranks=self.ranks.of("denoiser") if self.ranks is not None else None,
        )

    def _warm_up(self, model: ModelArgs, others: OtherStages) -> None:
        stage = self.stages[model.name]
        requests = warm_up_requests(stage, self.description.of(model.name), model)
        if requests:
            context = serve.get_replica_context()
            tell = partial(tell_start, context.app_name, context.deployment)
            warm_up(WarmReplica(stage, self.threads, self.denoiser, self.media_pool), requests, others.encode, tell)

    def _stage_of(self, model: str) -> StagePipeline:
        """That of the model that a request names. Raises RuntimeError."""
        return of_model(self.stages, model)

    def _open_fitness(self, model: ModelArgs) -> Fitness:
        threads = self.threads
        signs = [hangs("the work in the pipeline's thread", threads.under_way, model.watchdog, threads.waited_until)]
        if self.denoiser is not None:
            engine = self.denoiser.engine
            signs.append(lambda: None if engine.is_alive else "the engine's thread has ended")
            signs.append(hangs("a forward", engine.under_way, model.watchdog))
        if self.ranks is not None:
            ranks = self.ranks.group
            signs.append(lambda: ranks.lost)
        return Fitness(DeviceProbe(self.device), signs)

    # -- the work of the stages -----------------------------------------------------------------------------

    async def encode(self, request: GenerationRequest, envelope: Envelope = UNFOLLOWED) -> Conditioning:
        """The encoder stage."""
        self._check_stage("encoder")
        async with self.fitness.work(envelope):
            stage = self._stage_of(request.model)
            found = await self._brought(stage, uses_of(request))
            made = await self.threads.run(stage, "encoder", with_contents(request, found), envelope, encode)
            return replace(made, making=self._making_of(request.model))

    async def denoise(
        self,
        request: GenerationRequest,
        envelope: Envelope,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None = None,
    ) -> AsyncIterator[StreamItem]:
        """Progress and checkpoints as they come, at last the inputs of the VAE stage."""
        self._check_stage("denoiser")
        assert self.denoiser is not None
        self._others.use_running_loop()
        async with self.fitness.work(envelope) as trial:
            self._check_making(request.model, conditioning.making)
            with self._owners.bound_to(envelope.owner):
                items = denoising_stream(self.threads, self.denoiser, request, envelope, conditioning, checkpoint)
                async for item in items:
                    if isinstance(item, DenoisingProgress):
                        trial.reached(item.step)
                    if isinstance(item, DecodeInputs):
                        item = replace(item, making=self._making_of(request.model))
                    yield item

    async def decode(self, request: GenerationRequest, inputs: DecodeInputs, envelope: Envelope = UNFOLLOWED) -> Media:
        """The VAE stage: while the pool writes this request's files, the next request may decode."""
        self._check_stage("vae")
        async with self.fitness.work(envelope):
            self._check_making(request.model, inputs.making)
            return await self._decode(request, inputs, envelope)

    async def _decode(self, request: GenerationRequest, inputs: DecodeInputs, envelope: Envelope) -> Media:
        assert self.media_pool is not None
        assert self._media_metrics is not None
        stage = self._stage_of(request.model)
        decoded = await self.threads.run(stage, "vae", request, envelope, decode, inputs)
        started = time.perf_counter()
        loop, write = asyncio.get_running_loop(), self._media_metrics.write
        with tracing.continued("write", envelope.trace, files=len(decoded.files)) as span:
            writing = [loop.run_in_executor(self.threads.request_threads, write, file) for file in decoded.files]
            files = tuple(await asyncio.gather(*writing))
            span.set(bytes_out=sum(len(file.data) for file in files))
        seconds = decoded.seconds | {"encode_media": time.perf_counter() - started}
        return Media(files, seconds, decoded.usage, inputs.num_steps, inputs.warnings)

    async def call_component(self, call: ComponentCall) -> ComponentAnswer:
        """Makes a call for another stage, for pipelines that need this stage's component in their loop."""
        async with self.fitness.work(UNFOLLOWED):
            self._check_making(call.model, call.making)
            stage = self._stage_of(call.model)
            found = await self._brought(stage, [use_of(plain) for plain in call.adapters])
            call = replace(call, adapters=tuple(use.plain() for use, _ in found))
            return await self.threads.in_worker(answer_with_adapters, stage, call)

    async def _brought(self, stage: StagePipeline, uses: Sequence[AdapterUse]) -> Brought:
        """The adapters for the encoders, in a thread that may wait for a download: the worker must not."""
        if not uses:
            return []
        return await asyncio.get_running_loop().run_in_executor(self.threads.request_threads, brought, stage, uses)

    def _making_of(self, model: str) -> str:
        """Raises RuntimeError."""
        return of_model(self.making, model)

    def _check_making(self, model: str, making: str) -> None:
        """Raises OtherVersionError for what was made by a replica of other arguments, as there are during an update."""
        if making not in ("", self._making_of(model)):
            raise OtherVersionError("what the request brings was made by another version of the model")

    def _check_stage(self, stage: StageName) -> None:
        """Raises RuntimeError: the application was bound wrongly."""
        if stage not in self.stage.stages:
            raise RuntimeError(f"this replica runs {' and '.join(self.stage.stages)}, it has no {stage} stage")

    def __del__(self) -> None:
        """Serve calls it when the replica is stopped: its spans that wait are sent."""
        tracing.stop()

    def synchronize(self) -> None:
        """Waits until the device has done what was queued."""
        synchronize(self.device)

    # -- what others ask of it ------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raises RuntimeError when it cannot work any more, so that Serve replaces the replica.

        Serve asks every few seconds: then the device's metrics are told, and an idle replica gives memory back.
        """
        self._tell_metrics()
        self.fitness.check()
        if self._idle_memory.is_due(self._idle_since()):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self.threads.request_threads, self._idle_memory.give_back)

    def _tell_metrics(self) -> None:
        busy_s = {stage: load.busy_s for stage, load in self.observers.find(StageLoads).loads().items()}
        self._stage_metrics.look(self.fitness.is_fit, busy_s)
        self._device_metrics.look()
        self._adapter_metrics.look()
        if self._media_metrics is not None:
            self._media_metrics.look()

    def _idle_since(self) -> float | None:
        """When its last work ended, by time.monotonic(); None during one."""
        ended = self.threads.under_way.idle_since
        if self.denoiser is None or ended is None:
            return ended
        engine = self.denoiser.engine
        engine_ended = engine.under_way.idle_since
        return None if engine.num_fibers or engine_ended is None else max(ended, engine_ended)

    async def describe(self) -> StageDescription:
        return self.description

    async def effects(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        """Which of the arguments that the caller set change nothing, and how many steps the request makes."""
        loop, stage = asyncio.get_running_loop(), self._stage_of(request.model)
        return await loop.run_in_executor(self.threads.request_threads, effects_of, stage, request, asked)

    async def arguments(
        self, names: tuple[str, ...], defaults: dict[str, Any], model: str
    ) -> list[ArgumentDescription]:
        """Those of `names` that this checkpoint of `model` reads, over the application's defaults."""
        loop, stage = asyncio.get_running_loop(), self._stage_of(model)
        return await loop.run_in_executor(self.threads.request_threads, arguments_of, stage, names, defaults)

    # -- adapters: LoRAs -------------------------------------------------------------------------------------

    async def inspect_adapter(self, use: dict[str, Any]) -> dict[str, Any]:
        """What an adapter is, which is fetched for it: `deployments.adapters.library.FetchedAdapter.describe`.

        `use` is an AdapterUse as plain values. Raises InvalidRequestError (param "loras") for what does not fit the
        model, StageUnavailableError for a place that cannot be reached now.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads.request_threads, described, self.stage, use_of(use))

    async def forget_adapter(self, digest: str) -> None:
        """Its memory is given back, where requests use it after their end."""
        for stage in self.stages.values():
            stage.adapters.forget(digest)
            await self.threads.in_worker(give_back_of_encoders, stage)
        if self.denoiser is not None:
            work = partial(self.stage.adapters.give_back, self.stage.layout.denoisers)
            self.denoiser.engine.submit(Fiber("forgotten adapters"), work)

    async def adapters_held(self) -> tuple[str, ...]:
        """The digests of those that are in this process's memory."""
        return tuple(dict.fromkeys(digest for stage in self.stages.values() for digest in stage.adapters.held()))

    async def record_routing_stats(self) -> dict[str, Any]:
        """By what `adapter_routing` prefers replicas; Serve asks every two seconds."""
        return {HELD: list(await self.adapters_held())}

    async def timings_of(self, request_id: str) -> list[dict[str, Any]]:
        """What this replica did for the request, if it is among the last; empty without stage logging."""
        return self.observers.recall(request_id)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serve_app.autoscaling` decides on; Serve asks every few seconds where a deployment scales."""
        engine = self.denoiser.engine if self.denoiser else None
        return autoscaling_stats(self.observers.find(StageLoads).loads(), engine, self._load_s)

    async def activity(self) -> dict[str, Any]:
        """How busy it is and with what, for those who watch the cluster."""
        return self._inside.activity()

    # -- asked by the /dev routes: see dev.Inside -----------------------------------------------------------

    async def inspect(self) -> dict[str, Any]:
        return self._inside.inspect()

    async def thread_stacks(self) -> dict[str, Any]:
        return self._inside.thread_stacks()

    async def start_profiler(self, max_s: float) -> dict[str, Any]:
        return await self._inside.start_profiler(max_s)

    async def stop_profiler(self) -> dict[str, Any]:
        return await self._inside.stop_profiler()

    async def feature_summaries(self) -> dict[str, Any]:
        return self._inside.feature_summaries()

    async def caches(self) -> dict[str, Any]:
        return await self._inside.caches()

    async def clear_caches(self) -> dict[str, Any]:
        """Forgets what it remembers of past requests and gives unused memory back; files stay."""
        self._inside.forget()
        await self.threads.in_worker(free_memory)
        return await self._inside.caches()


def described_together(
    stages: Mapping[str, StagePipeline], models: Sequence[ModelArgs], node_id: str
) -> StageDescription:
    """What a replica holds; of several models each component once, by MODEL.COMPONENT."""
    each = {
        model.name: replace(
            describe_stage(stages[model.name]),
            features=fields_of_features(features_beside(model)),
            node_id=node_id,
            version=model.version,
        )
        for model in models
    }
    first = next(iter(each.values()))
    if len(each) == 1:
        return first
    return replace(
        first,
        pipeline_class=" and ".join(dict.fromkeys(told.pipeline_class for told in each.values())),
        weight_bytes={
            f"{name}.{component}": num_bytes
            for name, told in each.items()
            for component, num_bytes in told.weight_bytes.items()
            if component not in stages[name].borrowed
        },
        shared={
            f"{name}.{component}": other for name, told in each.items() for component, other in told.shared.items()
        },
        models=each,
    )


def of_model(held: Mapping[str, T], model: str) -> T:
    """What is held of the model that a request names; where there is one alone, it is meant by all.

    Raises RuntimeError: the application was bound wrongly.
    """
    if len(held) == 1:
        return next(iter(held.values()))
    if model not in held:
        raise RuntimeError(f"this replica has {' and '.join(held)}, not {model!r}")
    return held[model]


def num_cpus() -> float:
    """That Ray has given this replica."""
    return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
