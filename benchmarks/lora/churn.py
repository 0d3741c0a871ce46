"""Five hundred requests over forty LoRAs where eight fit, in this process: what is loaded, when, and what stays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.engine import SMALL, Row, write_tiny
from benchmarks.lora.files import write_loras
from benchmarks.lora.popularity import Uses, drawn, requested
from deployments.adapters.args import AdapterCacheArgs
from deployments.devices import select_device
from deployments.messages import Conditioning
from deployments.model import DenoisingArgs, ModelArgs
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stages.build import build_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from env_config.variables import EnvConfig
from tests.support.engine_parity import deviation, handed_over

CALLERS = 8
STEPS, SIDE = 8, 64
SAMPLED_EVERY = 25  # requests
MIB = 2**20


@dataclass
class Seen:
    """Of one run of the load."""

    deviations: list[float] = field(default_factory=list)  # from the same request undisturbed
    device_bytes: list[int] = field(default_factory=list)
    host_bytes: list[int] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)


def measure(folder: Path, requests: int, loras: int, budget: int) -> Row:
    """A budget for so many on the device, and twice as many on the host. Raises what a request has raised."""
    checkpoint = folder / "checkpoint"
    write_tiny(SMALL, checkpoint)
    files = write_loras(checkpoint, folder / "loras", loras)
    size = max(file.stat().st_size for file in files)
    cache = AdapterCacheArgs(max_device_bytes=budget * size, max_host_bytes=2 * budget * size)
    load = drawn(files, requests)
    encoder = built(checkpoint, AdapterCacheArgs(), "encoder")
    conditioning = encode(encoder, requested("conditioning", (), SIDE, STEPS))
    truths = undisturbed(built(checkpoint, AdapterCacheArgs(), "denoiser"), conditioning, load)
    stage = built(checkpoint, cache, "denoiser")
    began = time.perf_counter()
    seen, batch_sizes = under_load(stage, conditioning, load, truths)
    seconds = time.perf_counter() - began
    told = stage.adapters.describe()
    taken = stage.adapters.take_seconds()
    loads = {tier: [each for of, each in taken if of == tier] for tier in ("device", "host")}
    return {
        "requests": len(seen.deviations),
        "seconds": seconds,
        "mean_batch": sum(n * count for n, count in batch_sizes.items()) / sum(batch_sizes.values()),
        "largest_deviation": max(seen.deviations),
        "device_hit_rate": hit_rate(told, "device"),
        "host_hit_rate": hit_rate(told, "host"),
        "evicted": told["evictions"].get("device", 0),
        "device_load_ms": 1000 * statistics.median(loads["device"]),
        "host_load_ms": 1000 * statistics.median(loads["host"]),
        "seconds_of_all_loads": sum(map(sum, loads.values())),
        "device_kib_most": max(seen.device_bytes) / 1024,
        "device_kib_budget": cache.max_device_bytes / 1024,
        "host_kib_most": max(seen.host_bytes) / 1024,
        "host_kib_budget": cache.max_host_bytes / 1024,
        "resident_mib_after_a_fifth": seen.resident_mib[len(seen.resident_mib) // 5],
        "resident_mib_at_the_end": seen.resident_mib[-1],
    }


def built(checkpoint: Path, cache: AdapterCacheArgs, stage: Any) -> StagePipeline:
    model = ModelArgs(path=str(checkpoint), name="loras", adapter_cache=cache)
    return build_stage(model, (stage,), EnvConfig(), select_device("cpu"))


def undisturbed(
    stage: StagePipeline, conditioning: Conditioning, load: Sequence[Uses]
) -> dict[Uses, list[torch.Tensor]]:
    """Of each different request, alone, in a process that keeps all LoRAs."""
    denoiser = DenoiserStage(stage, DenoisingArgs(), adapters=stage.adapters)
    with closing(denoiser.engine):
        return {
            uses: handed_over(denoiser.denoise(requested("alone", uses, SIDE, STEPS), conditioning)[0], stage)
            for uses in dict.fromkeys(load)
        }


def under_load(
    stage: StagePipeline, conditioning: Conditioning, load: Sequence[Uses], truths: dict[Uses, list[torch.Tensor]]
) -> tuple[Seen, dict[int, int]]:
    """By CALLERS at a time, each of whom waits for the answer to one request before the next."""
    seen = Seen()
    denoiser = DenoiserStage(stage, DenoisingArgs(max_batch_size=CALLERS, merging="always"), adapters=stage.adapters)

    def make(number: int, uses: Uses) -> float:
        inputs, _ = denoiser.denoise(requested(f"r{number}", uses, SIDE, STEPS), conditioning)
        if number % SAMPLED_EVERY == 0:
            note_memory(stage, seen)
        return deviation(handed_over(inputs, stage), truths[uses])

    with closing(denoiser.engine), ThreadPoolExecutor(CALLERS) as callers:
        seen.deviations = list(callers.map(make, range(len(load)), load))
    return seen, dict(denoiser.engine.statistics.batch_sizes)


def note_memory(stage: StagePipeline, seen: Seen) -> None:
    told = stage.adapters.describe()
    seen.device_bytes.append(told["device"]["bytes"])
    seen.host_bytes.append(told["host"]["bytes"])
    seen.resident_mib.append(psutil.Process().memory_info().rss / MIB)


def hit_rate(told: dict[str, Any], tier: str) -> float:
    hits, misses = told["hits"].get(tier, 0), told["misses"].get(tier, 0)
    return hits / max(1, hits + misses)
