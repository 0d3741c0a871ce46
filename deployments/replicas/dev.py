"""What a replica tells of itself: its load and its requests to those who watch the cluster, and in server dev mode the
stacks of its threads, its caches, a trace."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deployments.adapters.library import AdapterLibrary
from deployments.devices import Device, memory_allocated
from deployments.errors import InvalidRequestError
from deployments.media.pool import MediaPool
from deployments.messages import StageDescription
from deployments.observability.observer import Observers
from deployments.observability.present_requests import PresentRequests
from deployments.observability.stage_load import StageLoads
from deployments.observability.torch_profiler import ProfilerBusyError, TorchProfiler
from deployments.stages.denoise import DenoiserStage
from env_config.told.effective import effective_values
from env_config.variables import EnvConfig


@dataclass(frozen=True)
class Inside:
    """The parts of one replica that the /dev routes look at; each answer is JSON."""

    replica_id: str
    env: EnvConfig
    device: Device
    description: StageDescription
    observers: Observers
    denoiser: DenoiserStage | None
    media_pool: MediaPool | None
    adapters: Mapping[str, AdapterLibrary]  # by model

    def inspect(self) -> dict[str, Any]:
        """Who this replica is, its variables with the secrets masked, and the requests that it has now."""
        return {
            "replica_id": self.replica_id,
            "stages": self.description.stages,
            "process_id": self.description.process_id,
            "node_id": self.description.node_id,
            "device": self.device.name,
            "environment": [asdict(value) for value in effective_values(self.env)],
            **self.observers.describe(),
            "engine": self.denoiser and self.denoiser.engine.describe(),
            "media_pool": self.media_pool and self.media_pool.describe(),
            "adapters": {model: library.describe() for model, library in self.adapters.items()},
        }

    def activity(self) -> dict[str, Any]:
        """How busy this replica is and with what; counters are since its start. No path, address or setting."""
        engine = self.denoiser and self.denoiser.engine.describe()
        told = ("waiting_forwards", "forwards", "batches", "batch_sizes")
        return {
            "replica_id": self.replica_id,
            "stages": self.description.stages,
            "loads": {stage: asdict(load) for stage, load in self.observers.find(StageLoads).loads().items()},
            "requests": self.observers.find(PresentRequests).describe()["requests"],
            "engine": engine and {name: engine[name] for name in told},
        }

    def thread_stacks(self) -> dict[str, Any]:
        return {"replica_id": self.replica_id, "threads": thread_stacks()}

    async def start_profiler(self, max_s: float) -> dict[str, Any]:
        """Opens a window over all that this process does; raises InvalidRequestError during another trace."""
        profiler, folder = self.observers.find(TorchProfiler), self.env.runtime.cache_root / "profiles"
        return await self._profile(lambda: profiler.start_window(folder, max_s))

    async def stop_profiler(self) -> dict[str, Any]:
        """Ends the window; raises InvalidRequestError where none is open."""
        return await self._profile(self.observers.find(TorchProfiler).stop_window)

    async def _profile(self, action: Callable[[], Path]) -> dict[str, Any]:
        try:
            file = await asyncio.get_running_loop().run_in_executor(None, action)
        except (ProfilerBusyError, ValueError) as error:
            raise InvalidRequestError(str(error)) from error
        return {"replica_id": self.replica_id, "file": str(file)}

    def feature_summaries(self) -> dict[str, Any]:
        """What each feature has done for the latest requests, by the names of features."""
        recent = self.denoiser.recent_summaries if self.denoiser else {}
        return {"replica_id": self.replica_id, "features": {name: list(each) for name, each in recent.items()}}

    async def caches(self) -> dict[str, Any]:
        """Bytes of each folder below the cache root and of the device's memory."""
        content = await asyncio.get_running_loop().run_in_executor(
            None, describe_caches, self.env.runtime.cache_root, self.device
        )
        return {"replica_id": self.replica_id, **content}

    def forget(self) -> None:
        """Drops what the replica remembers of past requests."""
        self.observers.forget()
        if self.denoiser:
            for summaries in self.denoiser.recent_summaries.values():
                summaries.clear()


def thread_stacks() -> dict[str, list[str]]:
    """The stack of each thread of this process, its innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": traceback.format_stack(frame)
        for ident, frame in sys._current_frames().items()
    }


def describe_caches(cache_root: Path, device: Device) -> dict[str, Any]:
    """Bytes of each folder below the cache root, and of the device's memory."""
    folders = sorted(path for path in cache_root.iterdir() if path.is_dir()) if cache_root.is_dir() else []
    return {
        "cache_root": str(cache_root),
        "folder_bytes": {folder.name: folder_bytes(folder) for folder in folders},
        "device_bytes_in_use": memory_allocated(device),
        "device_bytes_reserved": torch.accelerator.memory_reserved() if torch.accelerator.is_available() else None,
    }


def folder_bytes(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except FileNotFoundError:  # gone meanwhile
                continue
    return total


def free_memory() -> None:
    """Give back what Python and the device's allocator hold without using it."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
