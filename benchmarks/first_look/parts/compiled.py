"""Part 9: regional compilation with a dynamic batch in the engine's thread: whether it works, and what it gains."""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.first_look.models import Flux, flux_inputs, flux_transformer
from benchmarks.first_look.part import Findings, Setting, deviations, seconds
from deployments.engine.engine import Engine

BATCHES = (1, 4)
MOST_OFF = 0.05  # relative L2 of a forward in bfloat16


@torch.no_grad()
def look(setting: Setting) -> Findings:
    findings = Findings()
    transformer = flux_transformer(setting)
    side = setting.pick(1024, 64)
    inputs = {batch: flux_inputs(setting, transformer, side, batch) for batch in BATCHES}
    eager = {batch: seconds(setting, partial(transformer, **inputs[batch])) for batch in BATCHES}
    plain = transformer(**inputs[1])[0]
    backend = setting.pick("inductor", "eager")  # a rehearsal compiles nothing
    transformer.compile_repeated_blocks(dynamic=True, backend=backend)
    flux, engine = Flux(setting, transformer), Engine()
    try:
        began = time.perf_counter()
        flux.by_engine(engine, flux.arguments(side, 2))
        findings.note("first_s", time.perf_counter() - began, f"the first request: {time.perf_counter() - began:.1f} s")
    except Exception as error:  # noqa: BLE001  (of a compiler: it is told)
        findings.refuse_unless(False, f"compiled blocks fail in the engine's thread: {type(error).__name__}: {error}")
        return findings
    finally:
        engine.close()
    for batch in BATCHES:
        took = seconds(setting, partial(transformer, **inputs[batch]), warm=2)
        told = f"{side}^2 x {batch}: eager {1000 * eager[batch]:.1f} ms, compiled {1000 * took:.1f} ms"
        findings.note(
            f"x{batch}", {"eager_s": eager[batch], "compiled_s": took}, f"{told} ({eager[batch] / took:.2f}x)"
        )
    largest, norm = deviations(transformer(**inputs[1])[0], plain)
    findings.note(
        "deviation", [largest, norm], f"compiled against eager: {largest:.1e} of the largest, {norm:.1e} in L2"
    )
    findings.refuse_unless(norm < MOST_OFF, f"compiled forwards are off by {norm:.1e} in relative L2")
    return findings
