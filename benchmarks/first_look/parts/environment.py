"""Part 0: what the machine has, and whether the code can be imported here."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.first_look.part import Findings, Setting

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "greenlet", "cache-dit", "pydantic")
OURS = (
    "deployments.engine.engine",
    "deployments.stage_pipeline.sessions.denoise",
    "deployments.denoising.checkpoint",
    "deployments.stages.denoise",
)
ASKED = ("name", "memory.total", "memory.used", "driver_version", "clocks.max.sm", "power.limit")


def look(setting: Setting) -> Findings:
    findings = Findings()
    findings.note("python", platform.python_version(), f"Python {platform.python_version()}")
    versions = {name: version_of(name) for name in PACKAGES}
    findings.note("versions", versions, ", ".join(f"{name} {found or 'missing'}" for name, found in versions.items()))
    missing = [name for name, found in versions.items() if found is None]
    findings.refuse_unless(not missing, f"{', '.join(missing)} missing: carry the wheels (see --prepare)")
    for name in OURS:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  (of whatever kind: it is told)
            findings.refuse_unless(False, f"{name} cannot be imported here: {type(error).__name__}: {error}")
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        capability = f"{properties.major}.{properties.minor}"
        told = f"{properties.name}, {properties.total_memory / 1e9:.1f} GB, capability {capability}"
        findings.note("card", told, told)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        findings.note("nvidia_smi", said, f"nvidia-smi: {said}")
    return findings


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
