"""Part 4: the same bits: twice, in another process, after a pause in the middle, and of a decoder short of memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import torch

from benchmarks.first_look.models import Flux, flux_transformer, flux_vae
from benchmarks.first_look.part import Findings, Setting
from deployments.engine.engine import Engine

STEPS = 6
KEPT_FREE = 0.35  # of what a decoding takes


def look(setting: Setting) -> Findings:
    findings = Findings()
    first, second = digest_of(setting), digest_of(setting)
    findings.refuse_unless(first == second, "the same request twice in one process makes other bits")
    module = "benchmarks.first_look.parts.bits"
    command = [sys.executable, "-m", module, setting.device.type, str(int(setting.is_small))]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        findings.refuse_unless(False, f"the second process ended with {asked.returncode}: {asked.stderr[-400:]}")
        return findings
    elsewhere = json.loads(asked.stdout.splitlines()[-1])
    findings.refuse_unless(first == elsewhere, "the same request in another process makes other bits")
    findings.note("request", first, f"a request twice, and in another process: {first == second == elsewhere}")
    decoding(findings, setting)
    return findings


def digest_of(setting: Setting) -> str:
    flux = Flux(setting, flux_transformer(setting, **setting.pick({"num_layers": 4, "num_single_layers": 8}, {})))
    engine = Engine()
    try:
        latents = flux.by_engine(engine, flux.arguments(setting.pick(512, 64), STEPS))
    finally:
        engine.close()
    return digest(latents)


@torch.no_grad()
def decoding(findings: Findings, setting: Setting) -> None:
    """A library may choose another algorithm where little memory is left."""
    vae, side = flux_vae(setting), setting.pick(1024, 64)
    generator = torch.Generator(setting.device).manual_seed(0)
    latents = torch.randn(1, 16, side // 8, side // 8, device=setting.device, generator=generator).to(setting.dtype)
    first, second = (digest(vae.decode(latents, return_dict=False)[0]) for _ in range(2))
    findings.refuse_unless(first == second, "a decoding twice makes other bits")
    if setting.device.type != "cuda":
        findings.note("decoding", first == second, f"a decoding twice: {first == second}")
        return
    torch.cuda.reset_peak_memory_stats()
    vae.decode(latents, return_dict=False)
    taken = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, int(free - taken * (1 + KEPT_FREE))), dtype=torch.uint8, device=setting.device)
    try:
        short = digest(vae.decode(latents, return_dict=False)[0])
        findings.note("short_of_memory", short == first, f"with memory nearly full: the same bits: {short == first}")
    except torch.OutOfMemoryError:
        findings.note("short_of_memory", None, "with memory nearly full: out of memory")
    del ballast


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps(digest_of(Setting(torch.device(sys.argv[1]), bool(int(sys.argv[2]))))))
