"""Part 1: the plain loop of diffusers against the same call by the engine; how long the card is idle in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.first_look.models import Flux, flux_transformer
from benchmarks.first_look.part import Findings, Setting, seconds
from deployments.engine.engine import Engine

STEPS = 10
MOST_ADDED = 0.05  # of the plain loop's time: the engine has to stay below it for a lone request


def look(setting: Setting) -> Findings:
    findings = Findings()
    flux = Flux(setting, flux_transformer(setting))
    engine = Engine()
    try:
        for side in setting.pick((512, 1024), (64,)):
            arguments = flux.arguments(side, setting.pick(STEPS, 2))
            plain, ours = flux.plain(arguments), flux.by_engine(engine, arguments)
            findings.refuse_unless(
                torch.equal(plain, ours), f"at {side} the engine's latents are not the plain loop's, bit for bit"
            )
            alone = seconds(setting, lambda a=arguments: flux.plain(a))  # type: ignore[misc]
            by_engine = seconds(setting, lambda a=arguments: flux.by_engine(engine, a))  # type: ignore[misc]
            idle = {
                "plain": idle_share(setting, lambda a=arguments: flux.plain(a)),  # type: ignore[misc]
                "engine": idle_share(setting, lambda a=arguments: flux.by_engine(engine, a)),  # type: ignore[misc]
            }
            added = by_engine / alone - 1
            told = f"{side}^2: plain {alone:.3f} s, engine {by_engine:.3f} s ({added:+.1%}); idle share {idle}"
            findings.note(str(side), {"plain_s": alone, "engine_s": by_engine, "idle": idle}, told)
            findings.refuse_unless(
                setting.is_small or added < MOST_ADDED, f"at {side} the engine adds {added:.1%} to the plain loop"
            )
    finally:
        engine.close()
    return findings


def idle_share(setting: Setting, work: Callable[[], Any]) -> float | None:
    """Of the time between the first kernel and the last; None where there are none."""
    if setting.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        work()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return None
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return round(1 - busy / max(until - spans[0][0], 1e-9), 4)
