"""Which modular pipelines of diffusers are served, and how well: the table of docs/modular.md.

python -m tests.support.modular_table
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, ModularPipeline
from diffusers.guiders import BaseGuidance

from deployments.errors import CheckpointError
from deployments.stage_pipeline.description import call_parameters, media_kind
from deployments.stage_pipeline.modular.pipeline import called_class
from deployments.stage_pipeline.roles import assign_stages
from deployments.stage_pipeline.tasks import tasks_of
from tests.support.support_table import filled, line
from tests.support.tiny_models import MODULAR_MODELS

DOCS = Path("docs/modular.md")
HEADS = ("pipeline", "makes", "tasks", "must be given", "encoder", "denoiser", "VAE", "verdict")


@dataclass(frozen=True)
class Row:
    """One exported modular pipeline."""

    pipeline: str
    cells: tuple[str, ...]


def exported() -> dict[str, Any]:
    """Every modular pipeline that diffusers exports, by the name of its class."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("ModularPipeline")}
    return {name: cls for name, cls in found.items() if cls is not ModularPipeline}


def row_of(name: str, cls: Any) -> Row:
    """What its blocks say, without a checkpoint: of the components only the classes are known."""
    unloaded = cls()
    hints = {spec.name: spec.type_hint for spec in unloaded._component_specs.values()}
    guiders = {part: each for part, each in unloaded.components.items() if isinstance(each, BaseGuidance)}
    models = {part: hint for part, hint in hints.items() if is_model(hint)}
    try:
        called = called_class(unloaded, guiders, {}, {})
        kind = media_kind(called)
        stages = assign_stages(called.model_cpu_offload_seq, models)
        if not any("denoiser" in of for of in stages.values()):
            raise CheckpointError(f"it has no denoising model among {', '.join(sorted(models))}")
    except CheckpointError as error:
        return Row(name, ("", "", "", "", "", "", f"refused: {error}"))
    tasks = ", ".join(task.replace("_", " ") for task in tasks_of(called, kind))
    required = ", ".join(f"`{each}`" for each in call_parameters(called)[1])
    held = (", ".join(part for part in stages if stage in stages[part]) for stage in ("encoder", "denoiser", "vae"))
    return Row(name, (kind, tasks, required, *held, verdict(name)))


def is_model(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, torch.nn.Module) and hint is not AutoModel


def verdict(name: str) -> str:
    tried = [model for model, of in MODULAR_MODELS.items() if class_of(of) == name]
    return f"same bytes: {', '.join(f'`{model}`' for model in tried)}" if tried else "split, not tried"


def class_of(model: Any) -> str:
    """The class that a tiny model is built of, without building it."""
    return f"{model.build.args[0]}ModularPipeline"


def table() -> list[str]:
    rows = [row_of(name, cls) for name, cls in sorted(exported().items())]
    return [line(HEADS), line(["---"] * len(HEADS)), *(line([f"`{row.pipeline}`", *row.cells]) for row in rows)]


def main() -> None:
    lines = table()
    DOCS.write_text(filled(DOCS.read_text(encoding="utf-8"), "modular", lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
