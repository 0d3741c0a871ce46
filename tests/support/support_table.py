"""Which pipelines are served, and how well: the tables of docs/models.md and README.md, made from the tests' models.

python -m tests.support.support_table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.report import filled, table_in
from deployments.features.cache_dit.contexts import cached_denoisers, prepare
from deployments.modules import AccelerationError
from deployments.stage_pipeline.outputs import media_kind
from tests.support.engine_parity import NEVER_MERGED
from tests.support.preview_parity import NO_PREVIEWS
from tests.support.tiny_models import TINY_MODELS

DOCS = Path("docs/models.md")
README = Path("README.md")
DENOISERS = ("transformer", "transformer_2", "unet", "decoder")  # names of components

# The longest beginning of a pipeline's class -> its family.
FAMILIES = {
    "AnimateDiff": "AnimateDiff",
    "AuraFlow": "AuraFlow",
    "BriaFibo": "Bria Fibo",
    "Chroma": "Chroma",
    "CogVideoX": "CogVideoX",
    "CogView4": "CogView 4",
    "Cosmos": "Cosmos 1",
    "Cosmos2": "Cosmos 2",
    "EasyAnimate": "EasyAnimate",
    "Flux": "FLUX.1",
    "Flux2": "FLUX.2",
    "Helios": "Helios",
    "HiDream": "HiDream",
    "HunyuanImage": "HunyuanImage",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideo15": "HunyuanVideo 1.5",
    "Kandinsky5": "Kandinsky 5",
    "KandinskyV22": "Kandinsky 2.2",
    "LTX": "LTX-Video",
    "LTX2": "LTX-2",
    "LatentConsistency": "Latent Consistency",
    "Lumina2": "Lumina 2",
    "Mochi": "Mochi 1",
    "PRX": "PRX",
    "PixArt": "PixArt",
    "QwenImage": "Qwen-Image",
    "Sana": "Sana",
    "SkyReelsV2": "SkyReels V2",
    "StableAudio": "Stable Audio",
    "StableCascade": "Stable Cascade",
    "StableDiffusion": "Stable Diffusion 1.5",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionXL": "SDXL",
    "StableVideoDiffusion": "Stable Video Diffusion",
    "Wan": "Wan",
    "ZImage": "Z-Image",
}
# What a request of the test hands in beside its words; the first that is there names the task.
INPUTS = (
    ("video", "video"),
    ("conditions", "frames"),
    ("mask_image", "picture and mask"),
    ("controlnet_conditioning_scale", "control picture"),
    ("control_image", "control picture"),
    ("last_image", "first and last picture"),
    ("image", "picture"),
)


@dataclass(frozen=True)
class Row:
    """One tiny model of the tests."""

    family: str
    pipeline: str
    name: str
    task: str
    is_merged: bool
    is_cached: bool
    is_previewed: bool

    def cells(self) -> list[str]:
        marks = ["yes" if each else "" for each in (True, self.is_merged, self.is_cached, self.is_previewed)]
        return [self.family, self.task, f"`{self.pipeline}`", f"`{self.name}`", *marks]


def row_of(name: str) -> Row:
    """Builds the tiny model: which inputs its request has, whether Cache-DiT knows its denoisers."""
    pipeline, request = TINY_MODELS[name].build()
    class_name = type(pipeline).__name__
    return Row(
        family_of(class_name),
        class_name,
        name,
        task_of(pipeline, request),
        name not in NEVER_MERGED,
        is_cached(pipeline),
        name not in NO_PREVIEWS,
    )


def family_of(class_name: str) -> str:
    return FAMILIES[max(filter(class_name.startswith, FAMILIES), key=len)]


def task_of(pipeline: DiffusionPipeline, request: dict[str, object]) -> str:
    """`text to image`, `text, picture to video`."""
    given = ["text"] if "prompt" in request else []
    given += [word for name, word in INPUTS if name in request][:1]
    made = media_kind(type(pipeline))
    return f"{', '.join(given)} to {'sound' if made == 'audio' else made}"


def is_cached(pipeline: DiffusionPipeline) -> bool:
    """Whether Cache-DiT knows the class of every denoiser that it would cache."""
    held = tuple(name for name in DENOISERS if isinstance(getattr(pipeline, name, None), torch.nn.Module))
    try:
        for name in cached_denoisers(held):
            prepare(getattr(pipeline, name))
    except AccelerationError:
        return False
    return True


def models_table(rows: Sequence[Row]) -> list[str]:
    heads = ["family", "task", "pipeline", "in the tests", "same bytes", "batched", "cached", "previewed"]
    return [line(heads), line(["---"] * len(heads)), *(line(row.cells()) for row in sorted_rows(rows))]


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.family.lower(), row.task, row.name))


def tasks_table(rows: Sequence[Row]) -> list[str]:
    """One line for each task that is served: its configurations, how many of them can what, and their families."""
    rows = [row for row in rows if not row.task.endswith("to sound")]
    heads = ["task", "tried", "same bytes", "batched", "cached", "previewed", "families"]
    lines = [line(heads), line(["---"] * len(heads))]
    for task in sorted({row.task for row in rows}, key=lambda task: (task.rsplit(" to ")[1], task)):
        of_task = [row for row in sorted_rows(rows) if row.task == task]
        lines.append(counted(task, of_task, ", ".join(dict.fromkeys(row.family for row in of_task))))
    return [*lines, counted("all", rows, f"{len({row.family for row in rows})} families")]


def counted(task: str, rows: Sequence[Row], families: str) -> str:
    can = [sum(getattr(row, name) for row in rows) for name in ("is_merged", "is_cached", "is_previewed")]
    return line([task, *map(str, (len(rows), len(rows), *can)), families])


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows_of_the_page() -> dict[str, Row]:
    """What docs/models.md says, by the names of the tiny models."""
    rows = {}
    for row in table_in(DOCS.read_text(encoding="utf-8"), "models")[2:]:
        cells = [cell.strip(" `") for cell in row[1:-1].split("|")]
        family, task, pipeline, name = cells[:4]
        rows[name] = Row(family, pipeline, name, task, *(cell == "yes" for cell in cells[5:]))
    return rows


def main() -> None:
    rows = [row_of(name) for name in TINY_MODELS]
    for page, name, lines in ((DOCS, "models", models_table(rows)), (README, "tasks", tasks_table(rows))):
        page.write_text(filled(page.read_text(encoding="utf-8"), name, lines), encoding="utf-8")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
