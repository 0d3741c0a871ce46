"""Eight requests at a time: with eight LoRAs, with one, with none, and with a server that sets one after the other."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine import BATCH, LARGE, SMALL, TEXT_TOKENS, Model, Row, Size, median_ratio, seconds_of
from benchmarks.engine import write_tiny as write_checkpoint
from benchmarks.lora.files import write_loras
from deployments.adapters.use import FEATURE, AdapterUse
from deployments.messages import GenerationRequest

TOKENS = (16, 64)  # of the latents: side of the picture / 16, squared
STEPS = 20
WAYS = {
    "none": "without LoRAs, in a process that has seen none",
    "none_beside": "without LoRAs, in a process that holds eight",
    "one": "all with the same LoRA",
    "eight": "each with a LoRA of its own",
    "switching": "each with a LoRA of its own, one after another, diffusers' `set_adapters` before each",
}


def measure(rounds: int, note: Callable[[Row], None]) -> None:
    for size in (SMALL, LARGE):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "checkpoint"
            write_checkpoint(size, checkpoint)
            files = write_loras(checkpoint, Path(folder) / "loras", BATCH)
            for tokens in TOKENS:
                note(compared(size, checkpoint, files, tokens, rounds))


def compared(size: Size, checkpoint: Path, files: list[Path], tokens: int, rounds: int) -> Row:
    """Pictures a second of each way, medians of rounds in which they take turns, and their ratios."""
    with all_ways(size, checkpoint, files, tokens) as ways:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(2):  # the first merges of a structure are checked
            for way in ways.values():
                way()
        for _ in range(rounds):
            for name, way in ways.items():
                seconds[name].append(seconds_of(way))
    return {
        "model": size.name,
        "tokens": tokens + TEXT_TOKENS,
        **{name: BATCH / statistics.median(seconds[name]) for name in WAYS},
        "eight_to_one": median_ratio(seconds["one"], seconds["eight"]),
        "eight_to_none": median_ratio(seconds["none"], seconds["eight"]),
        "eight_to_switching": median_ratio(seconds["switching"], seconds["eight"]),
        "none_beside_to_none": median_ratio(seconds["none"], seconds["none_beside"]),
        "lone_beside_to_lone": median_ratio(seconds["lone"], seconds["lone_beside"]),
    }


@contextmanager
def all_ways(size: Size, checkpoint: Path, files: list[Path], tokens: int) -> Iterator[dict[str, Callable[[], Any]]]:
    """WAYS, and one request alone without LoRAs in a process that has seen none (`lone`) or holds eight."""
    bare, holding, switched = (Model(size.name, checkpoint) for _ in range(3))
    plain = [bare.request(tokens, STEPS, f"plain-{i}") for i in range(BATCH)]
    own = [with_lora(request, file) for request, file in zip(plain, files, strict=True)]
    same = [with_lora(request, files[0]) for request in plain]
    conditioning = bare.conditioning(plain[0])  # these LoRAs change no text encoder
    for file in files:
        switched.stage.pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)

    def switching() -> None:
        for request, file in zip(plain, files, strict=True):
            switched.stage.pipeline.set_adapters([file.stem], [1.0])
            switched.run_plain(request, conditioning)

    settings: dict[str, Any] = {"max_batch_size": BATCH, "merging": "always"}
    with (
        bare.engine(**settings) as without,
        holding.engine(**settings) as beside,
        ThreadPoolExecutor(BATCH) as callers,
    ):

        def run(stage: Any, requests: list[GenerationRequest]) -> None:
            list(callers.map(stage.denoise, requests, [conditioning] * len(requests)))

        run(beside, own)  # from here on it holds all eight
        yield {
            "none": lambda: run(without, plain),
            "none_beside": lambda: run(beside, plain),
            "one": lambda: run(beside, same),
            "eight": lambda: run(beside, own),
            "switching": switching,
            "lone": lambda: run(without, plain[:1]),
            "lone_beside": lambda: run(beside, plain[:1]),
        }


def with_lora(request: GenerationRequest, file: Path) -> GenerationRequest:
    use = AdapterUse(file.stem, str(file))
    return GenerationRequest(
        **{**vars(request), "request_id": f"{request.request_id}-{file.stem}", "features": {FEATURE: [use.plain()]}}
    )
