"""What the replicas of all stages share: they read the environment, load their part and own the threads."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import ray
import torch

from deployments.devices import select_device, synchronize
from deployments.errors import CheckpointError
from deployments.messages import ComponentAnswer, ComponentCall, StageDescription, StageName
from deployments.model import ModelArgs
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.weights import resolve_checkpoint
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

MAX_REQUEST_THREADS = 64  # each waits for the engine most of the time; Serve's max_ongoing_requests bounds them first

P = ParamSpec("P")
T = TypeVar("T")


class StageReplica:
    """The base of the three stages' replicas; a subclass names its stages and adds their methods."""

    def __init__(self, model: ModelArgs, stages: tuple[StageName, ...]) -> None:
        self.env = EnvConfig.from_environ()
        device = select_device(self.env.runtime.target_device)
        folder = resolve_checkpoint(model.path, self.env.runtime.cache_root)
        dtype = None if model.dtype == "auto" else getattr(torch, model.dtype)
        self.stage = load_stage(folder, stages, device.torch_device, dtype)
        self.description = dataclasses.replace(
            describe_stage(self.stage), node_id=ray.get_runtime_context().get_node_id()
        )
        check_default_arguments(model, self.description)
        self.device = device
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="stage")
        self.request_threads = ThreadPoolExecutor(max_workers=MAX_REQUEST_THREADS, thread_name_prefix="request")
        logger.info("%s holds %s on %s", "+".join(stages), self.description.weight_bytes, device.name)

    def synchronize(self) -> None:
        """Waits until the device has done what was queued."""
        synchronize(self.device)

    async def in_worker(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs the function in the thread that owns the model; the event loop stays free."""
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
