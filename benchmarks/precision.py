"""What each scheme of `precision` costs and gains: the judge's verdict on pictures, bytes, and the time of a forward.

    OMP_NUM_THREADS=1 python -m benchmarks.precision [--prompts N] [--steps N] [--rounds N]

The embedded emoji-flux draws the held-out prompts once for each scheme, from the same seeds, and the judge of
checkpoints/train (templates, no model) says of each picture what it shows. Schemes that this machine lacks the hardware
for are named with the reason. Writes docs/benchmarks/precision.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks import report
from checkpoints.train.evaluate import SIDE, held_out_prompts
from checkpoints.train.evaluate import report as judged
from deployments.errors import CheckpointError
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from tests.support.gguf_files import write_gguf

MODEL = Path("checkpoints/emoji-flux")
TEXT_TOKENS = 64
BATCH = 10
IMAGE_TOKENS = 64  # of a forward that is timed: 128 x 128 pixels


@dataclass(frozen=True)
class Row:
    name: str
    precision: str | None
    dtype: torch.dtype | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15, help="forwards that are timed for each scheme")
    options = parser.parse_args()
    wanted = held_out_prompts(options.prompts)
    with tempfile.TemporaryDirectory(prefix="triptych-precision-") as folder:
        rows = rows_of(Path(folder))
        stages = {row.name: load(row) for row in rows}
        loaded = {name: stage for name, stage in stages.items() if isinstance(stage, StagePipeline)}
        seconds = forward_seconds(loaded, options.rounds)
        drawn = {name: draw(stage, [prompt for _, prompt in wanted], options.steps) for name, stage in loaded.items()}
    whole = rows[0].name
    found = [
        {
            "name": name,
            "bytes": stage.weight_bytes()["transformer"],
            "seconds": seconds[name],
            "from_whole": mean_difference(drawn[name], drawn[whole]),
            **judged(wanted, drawn[name]),
        }
        for name, stage in loaded.items()
    ]
    refused = {name: str(error) for name, error in stages.items() if isinstance(error, CheckpointError)}
    write(
        {"machine": report.machine(), "rows": found, "refused": refused, "prompts": len(wanted), "steps": options.steps}
    )


def rows_of(folder: Path) -> list[Row]:
    files = {kind: write_gguf(MODEL / "transformer", folder / f"emoji-{kind}.gguf", kind) for kind in ("Q8_0", "Q4_0")}
    return [
        Row("none (float32)", None, torch.float32),
        Row("all in bfloat16", None, torch.bfloat16),
        Row("int8", "int8", torch.float32),
        Row("int8_dynamic", "int8_dynamic", torch.float32),
        Row("fp8", "fp8", torch.float32),
        Row("layerwise", "layerwise", torch.float32),
        *(Row(f"GGUF {kind}", str(file), torch.float32) for kind, file in files.items()),
        Row("fp8_dynamic", "fp8_dynamic", torch.bfloat16),
        Row("nf4", "nf4"),
    ]


def load(row: Row) -> StagePipeline | CheckpointError:
    try:
        return load_stage(MODEL, dtype=row.dtype, precision=row.precision)
    except CheckpointError as error:
        return error


def draw(stage: StagePipeline, prompts: Sequence[str], steps: int) -> list[Image.Image]:
    """One picture of 128 x 128 for each prompt; picture i starts from seed i."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        generators = [torch.Generator().manual_seed(start + offset) for offset in range(len(batch))]
        with torch.no_grad():
            pictures += stage.pipeline(
                batch,
                height=SIDE,
                width=SIDE,
                num_inference_steps=steps,
                max_sequence_length=TEXT_TOKENS,
                generator=generators,
            ).images
    return pictures


def mean_difference(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Of pixel values between 0 and 255."""
    pairs = zip(pictures, others, strict=True)
    return float(np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]))


def forward_seconds(stages: dict[str, StagePipeline], rounds: int) -> dict[str, float]:
    """The median of a lone forward of the transformer; the schemes take turns, as the machine is not always as busy."""
    times: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(rounds + 1):
        for name, stage in stages.items():
            spent = one_forward(stage.pipeline.transformer)
            if number:  # the first fills caches
                times[name].append(spent)
    return {name: statistics.median(each) for name, each in times.items()}


def one_forward(transformer: Any) -> float:
    config, dtype = transformer.config, transformer.dtype
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, IMAGE_TOKENS, config.in_channels, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator).to(dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.zeros(IMAGE_TOKENS, 3),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }
    started = time.perf_counter()
    with torch.no_grad():
        transformer(**inputs)
    return time.perf_counter() - started


def write(result: dict[str, Any]) -> None:
    whole = result["rows"][0]
    machine = result["machine"]
    rows = [
        (
            row["name"],
            f"{row['bytes'] / whole['bytes']:.2f}",
            f"{row['seconds'] / whole['seconds']:.2f}",
            f"{row['noun']:.0%}",
            f"{row['background']:.0%}",
            f"{row['size']:.0%}",
            f"{row['mean_absolute_difference']:.4f}",
            f"{row['from_whole']:.2f}",
        )
        for row in result["rows"]
    ]
    heads = ("precision", "bytes", "time of a forward", "noun", "background", "size", "from target", "from float32")
    lines = [
        "# Precision",
        "",
        f"`python -m benchmarks.precision`: the transformer of the embedded emoji-flux ({whole['bytes'] / 1e6:.1f} MB "
        f"in float32) draws {result['prompts']} held-out prompts, {result['steps']} steps, 128 x 128, the same seeds. "
        "Bytes and times are ratios to float32 without a scheme. `noun`, `background` and `size` are the shares of "
        "pictures in which the judge of `checkpoints/train` sees what the prompt asked for; `from target` is the mean "
        "absolute difference from the rendered scene, in [-1, 1]; `from float32` that from the unquantised picture, in "
        f"values of 0 to 255. One thread of a CPU with {machine['cores']} cores, load average "
        f"{machine['load_average'][0]:.1f}, torch {machine['torch']}: a GPU has other ratios of time, and the same of "
        "bytes.",
        "",
        *report.table(heads, rows),
        "",
        *(f"* `{name}` was not measured here: {why}" for name, why in result["refused"].items()),
    ]
    report.write("precision", result, lines)


if __name__ == "__main__":
    main()
