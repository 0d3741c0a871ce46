"""Part 2: one forward of several samples: time for each, peak of memory, and how far merged ones deviate."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.first_look.models import flux_inputs, flux_transformer
from benchmarks.first_look.part import Findings, Setting, deviations, gb, peak_bytes, seconds
from deployments.memory.activations import peak_of

BATCHES = (1, 2, 4, 8)
MOST_OVER_PLAN = 1.25  # of what the plan counts


@torch.no_grad()
def look(setting: Setting) -> Findings:
    findings = Findings()
    transformer = flux_transformer(setting)
    with torch.device("meta"):
        twin = type(transformer).from_config(transformer.config).to(setting.dtype).eval()
    for side in setting.pick((512, 1024), (64,)):
        lone = flux_inputs(setting, transformer, side, 1)
        alone = transformer(**lone)[0]
        for batch in BATCHES:
            inputs = flux_inputs(setting, transformer, side, batch)
            each = seconds(setting, partial(transformer, **inputs)) / batch
            measured = peak_bytes(setting, partial(transformer, **inputs))
            planned, _ = peak_of(partial(twin, **on_meta(inputs)), twin.parameters())
            largest, norm = deviations(transformer(**repeated(lone, batch))[0][:1], alone)
            told = f"{side}^2 x {batch}: {1000 * each:.1f} ms a sample, planned peak {gb(planned)}"
            if measured:
                told += f", measured {gb(measured[0])} (reserved {gb(measured[1])})"
                findings.refuse_unless(
                    measured[0] < MOST_OVER_PLAN * planned,
                    f"{side}^2 x {batch} takes {gb(measured[0])} of activations, the plan counts {gb(planned)}",
                )
            told += f"; merged against alone: {largest:.1e} of the largest value, {norm:.1e} in L2"
            figures = {"s": each, "planned": planned, "measured": measured, "largest": largest, "l2": norm}
            findings.note(f"{side}x{batch}", figures, told)
    return findings


def repeated(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """The lone sample's arguments, as many times."""
    shared = ("img_ids", "txt_ids")
    return {
        name: value.repeat(batch, *[1] * (value.ndim - 1))
        if isinstance(value, torch.Tensor) and name not in shared
        else value
        for name, value in inputs.items()
    }


def on_meta(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
