"""What the replicas of all stages share: they read the environment, load their part and own the threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray
import torch
from ray import serve

from deployments.accelerations import install_all
from deployments.devices import select_device, synchronize
from deployments.engine.engine import Engine
from deployments.errors import CheckpointError, InvalidRequestError
from deployments.features import install_features
from deployments.media.pool import MediaPool
from deployments.messages import (
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    Envelope,
    GenerationRequest,
    Media,
    StageDescription,
    StageName,
)
from deployments.model import ModelArgs
from deployments.modules import StageModules
from deployments.observability.kernel_api_log import KernelApiLog, instrument
from deployments.observability.logging_setup import apply_logging_level
from deployments.observability.stage_load import Load, StageLoad
from deployments.observability.stage_timing import StageTiming, stage_timer
from deployments.observability.torch_profiler import ProfilerBusyError, StepCounter, TorchProfiler
from deployments.replicas.dev import (
    PresentRequests,
    describe_caches,
    describe_engine,
    free_memory,
    thread_stacks,
)
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline, load_stage, weights_needed
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stages.decode import Decoded, decode
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from deployments.weights.load import resolve_checkpoint
from env_config.effective import effective_values
from env_config.library_caches import set_library_caches
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

MAX_REQUEST_THREADS = 64  # each waits for the engine most of the time; Serve's max_ongoing_requests bounds them first
RECENT = 200  # requests whose timings are kept for the ingress

P = ParamSpec("P")
T = TypeVar("T")


class StageReplica:
    """The base of the three stages' replicas; a subclass names its stages and adds their methods.

    A replica that cannot do what its variables or arguments say does not start: the constructor raises.
    """

    def __init__(self, model: ModelArgs, stages: tuple[StageName, ...]) -> None:
        self.env = EnvConfig.from_environ()
        runtime = self.env.runtime
        set_library_caches(runtime.cache_root)
        apply_logging_level(runtime.logging_level)
        # Before the device and the weights: see media_pool.
        self.media_pool = MediaPool(runtime.worker_multiproc_method) if "vae" in stages else None
        self.device = select_device(self.env.runtime.target_device)
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.timer = stage_timer(self.env.runtime, self.replica_id, self.synchronize)
        self.profiler = TorchProfiler(self.env.runtime)
        self.present = PresentRequests()
        self.loads = {stage: StageLoad() for stage in stages}
        self.recent_timings: deque[StageTiming] = deque(maxlen=RECENT)
        self.stage = self._load(model, stages)
        self._install_accelerations()
        node_id = ray.get_runtime_context().get_node_id()
        self.description = replace(describe_stage(self.stage), node_id=node_id)
        check_default_arguments(model, self.description)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage")
        self.request_threads: Executor = ThreadPoolExecutor(
            max_workers=MAX_REQUEST_THREADS, thread_name_prefix="request"
        )
        logger.info("%s: %s on %s", "+".join(stages), self.description.weight_bytes, self.device.name)

    def _load(self, model: ModelArgs, stages: tuple[StageName, ...]) -> StagePipeline:
        cache_root, use_streamer = self.env.runtime.cache_root, self.env.runtime.use_runai_model_streamer
        folder = resolve_checkpoint(model.path, cache_root, (), use_streamer)
        folder = resolve_checkpoint(model.path, cache_root, weights_needed(folder, stages), use_streamer)
        dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        exceptions = {name: getattr(torch, value) for name, value in model.component_dtypes.items()}
        return load_stage(folder, stages, self.device.torch_device, dtype, use_streamer, exceptions)

    def _install_accelerations(self) -> None:
        log = KernelApiLog(self.env.kernel_api)
        components = self.stage.components
        modules = StageModules(
            stages=self.stage.stages,
            components=components,
            denoisers=tuple(n for n in self.stage.layout.denoisers if n in components),
            autoencoders=tuple(n for n in self.stage.layout.autoencoders if n in components),
            device=self.device,
            wrap_kernel=log.wrap,
        )
        for line in (*install_all(modules, self.env), *install_features(modules, self.env)):
            logger.info("%s", line)
        instrument(components, log)

    def synchronize(self) -> None:
        """Waits until the device has done what was queued."""
        synchronize(self.device)

    async def run_stage(self, stage: StageName, request: GenerationRequest, work: Callable[..., T], *inputs: Any) -> T:
        """Runs `work(pipeline, request, *inputs)` in the worker thread, observed; the event loop stays free."""
        arrived = time.time()
        self.present.wait(request.request_id, stage, arrived)

        def observed() -> T:
            with self.observed(stage, request, arrived, *inputs) as (timing, _):
                output = work(self.stage, request, *inputs)
                timing.bytes_out = num_bytes(output)
                return output

        with self.loads[stage].request():
            return await self.in_worker(observed)

    async def encode_for(self, request: GenerationRequest, envelope: Envelope) -> Conditioning:
        """The encoder stage; its load is told of the requests that were refused before this one."""
        self.loads["encoder"].note_refused(envelope.refused_before)
        return await self.run_stage("encoder", request, encode)

    async def decode_and_write(self, request: GenerationRequest, inputs: DecodeInputs) -> Media:
        """The VAE stage: while the pool writes this request's files, the next request may decode."""
        assert self.media_pool is not None
        decoded = await self.run_stage("vae", request, decode, inputs)
        started = time.perf_counter()
        loop, pool = asyncio.get_running_loop(), self.media_pool
        writing = [loop.run_in_executor(self.request_threads, pool.write, file) for file in decoded.files]
        files = tuple(await asyncio.gather(*writing))
        return Media(files, decoded.seconds | {"encode_media": time.perf_counter() - started})

    @contextlib.contextmanager
    def observed(
        self, stage: StageName, request: GenerationRequest, arrived: float, *inputs: Any
    ) -> Iterator[tuple[StageTiming, StepCounter]]:
        """Times and traces one stage of one request, in the thread that works; `arrived` is a time.time()."""
        load = self.loads[stage]
        with (
            load.request() if stage == "denoiser" else contextlib.nullcontext(),  # the others wait for their turn first
            load.work(),
            self.present.run(request.request_id, stage, arrived),
            self.profiler.trace(request.request_id, stage, self.replica_id, all_threads=stage == "denoiser") as trace,
            self.timer.measure(request.request_id, stage) as timing,
        ):
            timing.queue_s = time.time() - arrived
            sent = max((getattr(message, "made_at", 0.0) for message in inputs), default=0.0)
            timing.transfer_s = max(0.0, arrived - sent) if sent else 0.0
            timing.bytes_in = sum(num_bytes(message) for message in inputs)
            self.recent_timings.append(timing)
            yield timing, trace

    async def in_worker(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in the thread that owns the model."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, lambda: function(*args, **kwargs))

    async def call_component(self, call: ComponentCall) -> ComponentAnswer:
        """Makes a call for another stage, for pipelines that need this stage's component in their loop."""
        return await self.in_worker(answer_call, self.stage, call)

    async def describe(self) -> StageDescription:
        return self.description

    async def timings_of(self, request_id: str) -> list[dict[str, Any]]:
        """What this replica did for the request, if it is among the last; empty without stage logging."""
        if not self.env.runtime.stage_logging:
            return []
        return [asdict(timing) for timing in self.recent_timings if timing.request_id == request_id]

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serve_app.autoscaling` decides on; Serve asks every few seconds where a deployment scales."""
        loads = {stage: load.load() for stage, load in self.loads.items()}
        if self.denoiser_here:
            outstanding_s = denoising_outstanding_s(loads["denoiser"], self.denoiser_here.engine)
            loads["denoiser"] = replace(loads["denoiser"], outstanding_s=outstanding_s)
        return {f"{stage}_{name}": value for stage, load in loads.items() for name, value in asdict(load).items()}

    @property
    def denoiser_here(self) -> DenoiserStage | None:
        """The step engine and its stage, in a replica that denoises."""
        return None

    # -- asked by the /dev routes ---------------------------------------------------------------------------

    async def inspect(self) -> dict[str, Any]:
        """Who this replica is, its variables with the secrets masked, and the requests that it has now."""
        return {
            "replica_id": self.replica_id,
            "stages": self.stage.stages,
            "process_id": self.description.process_id,
            "node_id": self.description.node_id,
            "device": self.device.name,
            "environment": [asdict(value) for value in effective_values(self.env)],
            "requests": self.present.describe(),
            "engine": describe_engine(self.denoiser_here),
            "media_pool": self.media_pool and self.media_pool.describe(),
        }

    async def thread_stacks(self) -> dict[str, Any]:
        return {"replica_id": self.replica_id, "threads": thread_stacks()}

    async def start_profiler(self, max_s: float) -> dict[str, Any]:
        """Opens a window over all that this process does; raises InvalidRequestError during another trace."""
        folder = self.env.runtime.cache_root / "profiles"
        return await self._profile(lambda: self.profiler.start_window(self.replica_id, folder, max_s))

    async def stop_profiler(self) -> dict[str, Any]:
        return await self._profile(self.profiler.stop_window)

    async def _profile(self, action: Callable[[], Path]) -> dict[str, Any]:
        try:
            file = await asyncio.get_running_loop().run_in_executor(None, action)
        except (ProfilerBusyError, ValueError) as error:
            raise InvalidRequestError(str(error)) from error
        return {"replica_id": self.replica_id, "file": str(file)}

    async def cache_dit_summary(self) -> dict[str, Any]:
        """Steps and blocks computed and reused by the last cached requests."""
        requests = list(self.denoiser_here.recent_summaries["cache_dit"]) if self.denoiser_here else []
        return {"replica_id": self.replica_id, "requests": requests}

    async def caches(self) -> dict[str, Any]:
        content = await asyncio.get_running_loop().run_in_executor(
            None, describe_caches, self.env.runtime.cache_root, self.device
        )
        return {"replica_id": self.replica_id, **content}

    async def clear_caches(self) -> dict[str, Any]:
        """Forgets what it remembers of past requests and gives unused memory back; files stay."""
        self.recent_timings.clear()
        if self.denoiser_here:
            for summaries in self.denoiser_here.recent_summaries.values():
                summaries.clear()
        await self.in_worker(free_memory)
        return await self.caches()


def denoising_outstanding_s(load: Load, engine: Engine) -> float:
    """Predicted busy seconds of the requests in the engine: by their own forwards, or like others before the first."""
    forwards_s, device_s = engine.remaining_s(), engine.statistics.seconds
    busy_share = load.busy_s / device_s if load.request_s and device_s else 1.0  # schedulers, hand-overs
    return sum(forwards_s) * busy_share + max(0, load.present - len(forwards_s)) * load.request_s


def check_default_arguments(model: ModelArgs, description: StageDescription) -> None:
    """Raises CheckpointError for a default that the pipeline's call does not take."""
    unknown = sorted(set(model.default_arguments) - set(description.parameters))
    if unknown:
        raise CheckpointError(
            f"default_arguments names {', '.join(unknown)}, which {description.pipeline_class} does not take; "
            f"it takes {', '.join(sorted(description.parameters))}"
        )


def num_bytes(message: Any) -> int:
    """Bytes of the numbers or files that a message carries."""
    if isinstance(message, Conditioning):
        return message.calls.num_bytes
    if isinstance(message, DecodeInputs):
        return message.content.num_bytes
    return message.num_bytes if isinstance(message, Decoded) else 0
