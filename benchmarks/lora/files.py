"""LoRA files with random numbers for the transformers of the engine's benchmark."""

from __future__ import annotations

from pathlib import Path

from diffusers import FluxPipeline

from tests.support.tiny_loras import TinyLora, write_lora

RANK = 8


def write_loras(checkpoint: Path, folder: Path, number: int, rank: int = RANK) -> list[Path]:
    """Of all attention layers of the transformer, as most published ones are."""
    pipeline = FluxPipeline.from_pretrained(checkpoint)
    loras = [TinyLora(f"lora-{i:02}", i, rank, float(rank), in_text_encoders=False) for i in range(number)]
    return [file.path for lora in loras for file in write_lora(pipeline, lora, folder)]
