"""Which LoRAs the requests of the load ask for: few are asked for often, and many seldom."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from deployments.adapters.use import FEATURE, AdapterUse
from deployments.messages import GenerationRequest, OutputFormat

NONE, TWO = 0.1, 0.15  # shares of the requests; the others have one
TEXT_TOKENS = 32

Uses = tuple[AdapterUse, ...]


def drawn(files: Sequence[Path], number: int, seed: int = 0) -> list[Uses]:
    """By Zipf's law with exponent 1, as downloads from a hub are spread; the same for the same seed."""
    choice = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(files) + 1)]
    load = []
    for _ in range(number):
        kind = choice.random()
        wanted = 0 if kind < NONE else 2 if kind < NONE + TWO else 1
        chosen: dict[Path, None] = {}
        while len(chosen) < wanted:
            chosen[choice.choices(files, weights)[0]] = None
        load.append(tuple(AdapterUse(file.stem, str(file), scale=1 / len(chosen)) for file in chosen))
    return load


def requested(name: str, uses: Uses, side: int, steps: int, is_deterministic: bool = False) -> GenerationRequest:
    """One picture; all of a load have the same prompt and seed."""
    arguments = {"prompt": "a small cat", "height": side, "width": side, "max_sequence_length": TEXT_TOKENS}
    return GenerationRequest(
        name,
        "loras",
        {**arguments, "num_inference_steps": steps},
        0,
        OutputFormat("image", "png"),
        deterministic=is_deterministic,
        features={FEATURE: [use.plain() for use in uses]} if uses else {},
    )
