"""A walk through a checkpoint's folder in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployments.model import ModelArgs
from deployments.plan.measure import measure
from deployments.plan.measured import Component, Measured
from deployments.plan.process import MeasureOrder
from env_config.variables import EnvConfig
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

ENV = EnvConfig.from_environ({"SGLANG_USE_RUNAI_MODEL_STREAMER": "false"})


def walked(
    folder: Path, width: int | None = None, height: int | None = None, num_frames: int | None = None, **args: Any
) -> Measured:
    """`args` are those of the model."""
    model = ModelArgs(path=str(folder), name=folder.name, **args)
    return measure(MeasureOrder(model=model, width=width, height=height, num_frames=num_frames), ENV)


def walked_as_small(name: str, root: Path) -> Measured:
    """A tiny model, at the size that its request has."""
    tiny_patches()
    request = request_arguments(name)
    sizes = [size if isinstance(size := request.get(side), int) else None for side in ("width", "height", "num_frames")]
    return walked(checkpoint(name, root), *sizes)


def component_of(measured: Measured, name: str) -> Component:
    [found] = [each for each in measured.components if each.name == name]
    return found


def peaks(measured: Measured) -> dict[str, float]:
    """GB of each call that is the hungriest of its kind."""
    found: dict[str, float] = {}
    for call in measured.calls:
        name = f"{call.component}.{call.method}"
        found[name] = max(found.get(name, 0.0), call.peak / 1e9)
    return found
