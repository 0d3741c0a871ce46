"""What a replica tells of itself in server dev mode: its requests, the stacks of its threads, its caches."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deployments.devices import Device, memory_allocated
from deployments.messages import StageName
from deployments.stages.denoise import DenoiserStage


class PresentRequests:
    """The requests that a replica has at this moment, for each of its stages."""

    def __init__(self) -> None:
        self._present: dict[tuple[str, StageName], tuple[float, str]] = {}  # -> (time.time() of arrival, state)

    def wait(self, request_id: str, stage: StageName, arrived: float) -> None:
        self._present[request_id, stage] = (arrived, "waiting")

    @contextmanager
    def run(self, request_id: str, stage: StageName, arrived: float) -> Iterator[None]:
        self._present[request_id, stage] = (arrived, "running")
        try:
            yield
        finally:
            self._present.pop((request_id, stage), None)

    def describe(self) -> list[dict[str, Any]]:
        now = time.time()
        return [
            {"request_id": request_id, "stage": stage, "state": state, "since_s": now - arrived}
            for (request_id, stage), (arrived, state) in sorted(self._present.items())
        ]


def thread_stacks() -> dict[str, list[str]]:
    """The stack of each thread of this process, its innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": traceback.format_stack(frame)
        for ident, frame in sys._current_frames().items()
    }


def describe_engine(denoiser: DenoiserStage | None) -> dict[str, Any] | None:
    """What waits in the step engine, and what it has done so far."""
    if denoiser is None:
        return None
    return denoiser.engine.describe()


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
