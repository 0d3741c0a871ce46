"""Part 10: a VAE in float16 that its pipeline casts to float32 and back, twice; which kernels attention takes."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.first_look.models import flux_vae
from benchmarks.first_look.part import Findings, Setting, seconds

KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


@torch.no_grad()
def look(setting: Setting) -> Findings:
    findings = Findings()
    vae, side = flux_vae(setting).to(torch.float16), setting.pick(1024, 64)
    latents = torch.randn(1, 16, side // 8, side // 8, device=setting.device)
    made = []
    for _ in range(2):
        vae.to(torch.float32)
        made.append(vae.decode(latents, return_dict=False)[0])
        vae.to(torch.float16)
    same = torch.equal(*made)
    findings.note("cast_twice", same, f"a VAE cast to float32 and back, twice: the same picture: {same}")
    findings.refuse_unless(same, "casting a VAE to float32 and back changes its next picture")
    attention(findings, setting)
    return findings


def attention(findings: Findings, setting: Setting) -> None:
    """Heads and length of Z-Image at 1024^2, with and without the mask that merged lists bring."""
    heads, length, dim = setting.pick((30, 4224, 128), (2, 64, 16))
    query = torch.randn(2, heads, length, dim, device=setting.device, dtype=setting.dtype)
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device=setting.device)
    mask[1, ..., length // 2 :] = False
    for name, given in {"without a mask": None, "with a mask": mask}.items():
        found = {}
        for kernel in KERNELS:
            try:
                with sdpa_kernel(kernel):
                    found[kernel.name] = seconds(
                        setting,
                        lambda m=given: torch.nn.functional.scaled_dot_product_attention(
                            query, query, query, attn_mask=m
                        ),  # type: ignore[misc]
                        repeats=1,
                    )
            except RuntimeError:
                found[kernel.name] = None
        told = ", ".join(f"{kernel} {'refuses' if s is None else f'{1000 * s:.2f} ms'}" for kernel, s in found.items())
        findings.note(name, found, f"attention {name}: {told}")
