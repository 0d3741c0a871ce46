"""Five hundred requests over forty LoRAs on Ray, while denoisers are killed: every request ends with the same bytes."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ray import serve

from benchmarks.engine import SMALL, Row, write_tiny
from benchmarks.lora.files import write_loras
from benchmarks.lora.popularity import Uses, drawn, requested
from benchmarks.recovery import own_ray
from deployments.adapters.args import AdapterCacheArgs
from deployments.model import DenoisingArgs, ModelArgs
from deployments.replicas.table import bind_stages
from serve_app.making.generate import generate
from serve_app.making.stages import Stages
from tests.support.kills import RecoveryLog, stages_of

APPLICATION = "loras"
CALLERS = 8
STEPS, SIDE = 20, 32
DENOISERS = 2
PATIENCE_S = 300
NAMES = ("Encoder", "Denoiser", "VAE")
NUMBERS = itertools.count()


def measure(folder: Path, requests: int, loras: int, budget: int, kills: int) -> Row:
    """Raises RuntimeError where a request has other bytes than undisturbed; what it raises itself goes through."""
    checkpoint = folder / "checkpoint"
    write_tiny(SMALL, checkpoint)
    files = write_loras(checkpoint, folder / "loras", loras)
    size = files[0].stat().st_size
    cache = AdapterCacheArgs(max_device_bytes=budget * size, max_host_bytes=2 * budget * size)
    model = ModelArgs(
        path=str(checkpoint),
        name="loras",
        adapter_cache=cache,
        denoising=DenoisingArgs(checkpoint_every=1),
    )
    with own_ray(2 + DENOISERS, "cpu"):
        _, denoiser, _ = bind_stages(model, NAMES, {"Denoiser": {"num_replicas": DENOISERS}})
        serve.run(denoiser, name=APPLICATION, route_prefix=None)
        return asyncio.run(load_under_kills(stages_of(APPLICATION), drawn(files, requests), kills))


async def load_under_kills(stages: Stages, load: Sequence[Uses], kills: int) -> Row:
    truths = {uses: await made(stages, uses) for uses in dict.fromkeys(load)}
    waiting, finished, deaths = iter(load), Counter[str](), 0
    began = time.perf_counter()

    async def caller() -> None:
        for uses in waiting:
            if await made(stages, uses) != truths[uses]:
                raise RuntimeError(f"other bytes than undisturbed with {[use.name for use in uses]}")
            finished["requests"] += 1

    with RecoveryLog() as log:
        callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
        choice = random.Random(0)
        for number in range(1, kills + 1):
            await until_finished(number * len(load) // (kills + 1), finished, callers)
            if process := await a_denoiser_at_work(stages, choice):
                os.kill(process, signal.SIGKILL)
                deaths += 1
        await asyncio.wait_for(asyncio.gather(*callers), PATIENCE_S)
    return {
        "requests": finished["requests"],
        "distinct": len(truths),
        "kills": deaths,
        "recoveries": log.recoveries,
        "lost_steps": log.lost_steps,
        "seconds": time.perf_counter() - began,
    }


async def made(stages: Stages, uses: Uses) -> bytes:
    name = f"{'+'.join(use.name for use in uses) or 'none'}-{next(NUMBERS)}"
    media = await generate(stages, requested(name, uses, SIDE, STEPS, is_deterministic=True))
    return media.files[0].data


async def until_finished(number: int, finished: Counter[str], callers: Sequence[asyncio.Task[None]]) -> None:
    """Raises what a caller has raised, and TimeoutError."""
    give_up = time.monotonic() + PATIENCE_S
    while finished["requests"] < number:
        for task in callers:
            if task.done():
                task.result()
        if time.monotonic() > give_up:
            raise TimeoutError("the load does not get on")
        await asyncio.sleep(0.01)


async def a_denoiser_at_work(stages: Stages, choice: random.Random) -> int | None:
    """The process of one that has a request now, when all are there; None where none has."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        answers = await stages.deployments()["Denoiser"].broadcast("inspect").results_async(timeout_s=PATIENCE_S)
        if len(answers) == DENOISERS:
            busy = [int(each["process_id"]) for each in answers if each["requests"]]
            return choice.choice(busy) if busy else None
        await asyncio.sleep(0.1)
    raise TimeoutError(f"not {DENOISERS} denoisers after {PATIENCE_S} s")
