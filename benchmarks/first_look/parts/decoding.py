"""Part 3: the decoders: time and peak of memory against the plan, and what another layout of memory changes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.first_look.models import flux_vae, wan_vae
from benchmarks.first_look.part import Findings, Setting, gb, peak_bytes, seconds
from deployments.memory.activations import peak_of

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a weight


@torch.no_grad()
def look(setting: Setting) -> Findings:
    findings = Findings()
    side = setting.pick(1024, 64)
    latents = torch.randn(1, 16, side // 8, side // 8, device=setting.device, dtype=setting.dtype)
    one(findings, setting, f"FLUX VAE {side}^2 bfloat16", flux_vae(setting), latents)
    height, width, frames = setting.pick((720, 1280, 81), (32, 32, 5))
    for dtype in (torch.bfloat16, torch.float32):
        shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        video = torch.randn(shape, device=setting.device, dtype=dtype)
        name = f"Wan VAE {width}x{height}x{frames} {str(dtype).removeprefix('torch.')}"
        one(findings, setting, name, wan_vae(setting, dtype), video)
    return findings


def one(findings: Findings, setting: Setting, name: str, vae: Any, latents: torch.Tensor) -> None:
    decode = partial(vae.decode, latents, return_dict=False)
    with torch.device("meta"):
        twin = type(vae).from_config(vae.config).to(latents.dtype).eval()
    planned, _ = peak_of(partial(twin.decode, latents.to("meta"), return_dict=False), twin.parameters())
    measured = peak_bytes(setting, decode)
    usual = seconds(setting, decode, repeats=1, warm=0)
    for weight in vae.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])
    other = seconds(setting, decode, repeats=1, warm=1)
    told = f"{name}: {usual:.3f} s, channels last {other:.3f} s; planned peak {gb(planned)}"
    if measured:
        told += f", measured {gb(measured[0])} (reserved {gb(measured[1])})"
    findings.note(name, {"s": usual, "other_layout_s": other, "planned": planned, "measured": measured}, told)
