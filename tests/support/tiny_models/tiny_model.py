"""What a tiny model is: how its pipeline is built, and what else belongs to its checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

PipelineAndRequest = tuple[DiffusionPipeline, dict[str, Any]]


@dataclass(frozen=True)
class TinyModel:
    """One configuration of one family.

    `build` returns the pipeline and the keyword arguments of one request.
    `after_save` edits the saved folder until it looks like the published checkpoints.
    `after_load` sets what is not part of a checkpoint; every process applies it to what it loaded, which
    may have skeletons (parameters on the meta device) or None in place of some components.
    """

    name: str
    build: Callable[[], PipelineAndRequest]
    after_save: Callable[[Path, DiffusionPipeline], None] | None = None
    after_load: Callable[[DiffusionPipeline], None] | None = None
