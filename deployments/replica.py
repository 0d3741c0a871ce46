"""What the replicas of all stages share: they read the environment, load their part and own the threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch
from ray import serve

from deployments.accelerations import StageModules, install_all
from deployments.devices import select_device, synchronize
from deployments.errors import CheckpointError
from deployments.messages import (
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    GenerationRequest,
    Media,
    StageDescription,
    StageName,
)
from deployments.model import ModelArgs
from deployments.observability.kernel_api_log import KernelApiLog, instrument
from deployments.observability.logging_setup import apply_logging_level
from deployments.observability.stage_timing import StageTiming, stage_timer
from deployments.observability.torch_profiler import StepCounter, TorchProfiler
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline, load_stage, weights_needed
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.weights import resolve_checkpoint
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

MAX_REQUEST_THREADS = 64  # each waits for the engine most of the time; Serve's max_ongoing_requests bounds them first

P = ParamSpec("P")
T = TypeVar("T")


class StageReplica:
    """The base of the three stages' replicas; a subclass names its stages and adds their methods.

    A replica that cannot do what its variables or arguments say does not start: the constructor raises.
    """

    def __init__(self, model: ModelArgs, stages: tuple[StageName, ...]) -> None:
        self.env = EnvConfig.from_environ()
        apply_logging_level(self.env.runtime.logging_level)
        self.device = select_device(self.env.runtime.target_device)
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.timer = stage_timer(self.env.runtime, self.replica_id, self.synchronize)
        self.profiler = TorchProfiler(self.env.runtime)
        self.stage = self._load(model, stages)
        self._install_accelerations()
        self.description = describe_stage(self.stage)
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
        return load_stage(folder, stages, self.device.torch_device, dtype, use_streamer)

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
        for line in install_all(modules, self.env):
            logger.info("%s", line)
        instrument(components, log)

    def synchronize(self) -> None:
        """Waits until the device has done what was queued."""
        synchronize(self.device)

    async def run_stage(self, stage: StageName, request: GenerationRequest, work: Callable[..., T], *inputs: Any) -> T:
        """Runs `work(pipeline, request, *inputs)` in the worker thread, observed; the event loop stays free."""
        arrived = time.time()

        def observed() -> T:
            with self.observed(stage, request, arrived, *inputs) as (timing, _):
                output = work(self.stage, request, *inputs)
                timing.bytes_out = num_bytes(output)
                return output

        return await self.in_worker(observed)

    @contextlib.contextmanager
    def observed(
        self, stage: StageName, request: GenerationRequest, arrived: float, *inputs: Any
    ) -> Iterator[tuple[StageTiming, StepCounter]]:
        """Times and traces one stage of one request, in the thread that works; `arrived` is a time.time()."""
        with (
            self.profiler.trace(request.request_id, stage, self.replica_id, all_threads=stage == "denoiser") as trace,
            self.timer.measure(request.request_id, stage) as timing,
        ):
            timing.queue_s = time.time() - arrived
            sent = max((getattr(message, "made_at", 0.0) for message in inputs), default=0.0)
            timing.transfer_s = max(0.0, arrived - sent) if sent else 0.0
            timing.bytes_in = sum(num_bytes(message) for message in inputs)
            yield timing, trace

    async def in_worker(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in the thread that owns the model."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, lambda: function(*args, **kwargs))

    async def call_component(self, call: ComponentCall) -> ComponentAnswer:
        """Makes a call for another stage, for pipelines that need this stage's component in their loop."""
        return await self.in_worker(answer_call, self.stage, call)

    async def describe(self) -> StageDescription:
        return self.description


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
    return sum(len(file.data) for file in message.files) if isinstance(message, Media) else 0
