"""A real replica in this process, constructed from environment variables; of all stages unless said otherwise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import serve

from deployments.devices import Device
from deployments.messages import STAGES, UNFOLLOWED, DecodeInputs, GenerationRequest, Media, OutputFormat, StageName
from deployments.model import DType, ModelArgs
from deployments.observability.observer import MakeObserver
from deployments.observability.table import OBSERVERS
from deployments.replicas.replica import StageReplica
from deployments.stages.denoise import DenoiserStage
from env_config.library_caches import LIBRARY_CACHES
from env_config.variables import BY_VARIABLE
from tests.support.tiny_models import tiny_patches

MakeReplica = Callable[..., "WholeReplica"]
NOTHING: Mapping[Any, Any] = MappingProxyType({})
ARGUMENTS = {
    "flux": {"prompt": "a small cat", "height": 32, "width": 32, "max_sequence_length": 32, "guidance_scale": 3.5},
    "wan22": {"prompt": "a small cat", "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0},
}
OUTPUTS = {"flux": OutputFormat("image", "png"), "wan22": OutputFormat("video", "mp4")}


class RuntimeContext:
    """What Ray tells a replica of itself: one device of each kind is its own."""

    def get_node_id(self) -> str:
        return "node-1"

    def get_assigned_resources(self) -> dict[str, float]:
        return {"CPU": 1.0, "GPU": 1.0, "NPU": 1.0}


class WholeReplica:
    """A replica, and how to ask it for a picture if it has all three stages."""

    def __init__(
        self,
        checkpoint: Path,
        dtype: DType = "auto",
        stages: tuple[StageName, ...] = STAGES,
        observers: Sequence[MakeObserver] = OBSERVERS,
        arguments: Mapping[str, Any] = NOTHING,
        others: Mapping[StageName, Any] = NOTHING,
        also: Sequence[Path] = (),
    ) -> None:
        self.model = checkpoint.name
        self.latents = b""  # of the last request, finer than the pixels of a file
        model, *further = (
            ModelArgs.model_validate({"path": str(each), "name": each.name, "dtype": dtype, **arguments})
            for each in (checkpoint, *also)
        )
        self.replica = StageReplica(
            model, stages, others, observers=observers, also=tuple((each, others) for each in further)
        )

    def generate(self, steps: int = 4, request_id: str = "r", seed: int = 0, **changes: Any) -> Media:
        """The files for the tiny model's usual request; `changes` are fields of the GenerationRequest."""
        output = OUTPUTS[self.model]
        arguments = {**ARGUMENTS[self.model], "num_inference_steps": steps}
        request = GenerationRequest(request_id, self.model, arguments, seed, output, **changes)
        return asyncio.run(self._generate(request))

    async def _generate(self, request: GenerationRequest) -> Media:
        conditioning = await self.replica.encode(request)
        async for item in self.replica.denoise(request, UNFOLLOWED, conditioning):
            if isinstance(item, DecodeInputs):
                self.latents = b"".join(buffer.tobytes() for buffer in item.content.buffers)
                return await self.replica.decode(request, item)
        raise AssertionError("the denoiser sent no decode inputs")

    def cache_summary(self, component: str = "transformer") -> dict[str, Any]:
        """Of the last request: steps and blocks that Cache-DiT computed and reused."""
        summary: dict[str, Any] = self.denoiser.recent_summaries["cache_dit"][-1][component]
        return summary

    @property
    def denoiser(self) -> DenoiserStage:
        assert self.replica.denoiser is not None
        return self.replica.denoiser

    def close(self) -> None:
        if self.replica.denoiser:
            self.replica.denoiser.engine.close()
        if self.replica.media_pool:
            self.replica.media_pool.close()
        self.replica.threads.close()


@pytest.fixture
def make_replica(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MakeReplica]:
    """Builds replicas from a checkpoint and variables by their full names; the CPU unless said otherwise."""
    tiny_patches()
    with ExitStack() as cleaning:
        cleaning.enter_context(loggers_restored())

        def make(
            checkpoint: Path,
            dtype: DType = "auto",
            stages: tuple[StageName, ...] = STAGES,
            observers: Sequence[MakeObserver] = OBSERVERS,
            arguments: Mapping[str, Any] = NOTHING,
            others: Mapping[StageName, Any] = NOTHING,
            also: Sequence[Path] = (),
            **variables: str,
        ) -> WholeReplica:
            replica_id = SimpleNamespace(unique_id="replica-1")
            context = SimpleNamespace(replica_id=replica_id, app_name="app", deployment="+".join(stages))
            monkeypatch.setattr(serve, "get_replica_context", lambda: context)
            monkeypatch.setattr(ray, "get_runtime_context", RuntimeContext)
            set_variables(monkeypatch, tmp_path, variables)
            whole = WholeReplica(checkpoint, dtype, stages, observers, arguments, others, also)
            cleaning.callback(whole.close)
            return whole

        yield make


def set_variables(monkeypatch: pytest.MonkeyPatch, folder: Path, variables: dict[str, str]) -> None:
    """Exactly these of the 45 are set, beside a cache root below `folder`, the CPU, and a quiet log."""
    for name in (*BY_VARIABLE, *LIBRARY_CACHES):
        monkeypatch.delenv(name, raising=False)
    defaults = {
        "SGLANG_DIFFUSION_TARGET_DEVICE": "cpu",
        "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache"),
        "SGLANG_DIFFUSION_LOGGING_LEVEL": "ERROR",
    }
    for name, value in (defaults | variables).items():
        assert name in BY_VARIABLE
        monkeypatch.setenv(name, value)


def pretend(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The replica believes that it runs on this device; its tensors stay on the CPU."""
    monkeypatch.setattr("deployments.replicas.replica.select_device", lambda name: Device(device, torch.device("cpu")))
    monkeypatch.setattr("deployments.replicas.replica.synchronize", lambda device: None)


@contextmanager
def loggers_restored() -> Iterator[None]:
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate
