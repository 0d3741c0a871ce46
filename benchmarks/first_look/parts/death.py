"""Part 6: a device that died: what the probe says of it, and errors in request code at several depths of greenlets."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks.first_look.part import Findings, Setting
from deployments.devices import Device, DeviceProbe
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber

DEPTHS = (1, 20, 200)
WITH_STACKS = {"TORCH_SHOW_CPP_STACKTRACES": "1"}  # torch then walks the C stack of each error


def look(setting: Setting) -> Findings:
    findings = Findings()
    command = [sys.executable, "-m", "benchmarks.first_look.parts.death", setting.device.type]
    for name, environment in {"errors": {}, "errors_with_stacks": WITH_STACKS}.items():
        ended = subprocess.run([*command, "errors"], env={**os.environ, **environment}, capture_output=True, text=True)
        told = f"errors at depths {DEPTHS} {environment or ''}: status {ended.returncode}"
        findings.note(name, ended.returncode, told)
        findings.refuse_unless(ended.returncode == 0, f"{told}: {ended.stderr[-300:]}")
    if setting.device.type == "cuda":
        ended = subprocess.run([*command, "assert"], capture_output=True, text=True)
        said = ended.stdout.strip().splitlines()[-1:]
        findings.note("assert", said, f"after a device-side assert the probe says: {said}")
        findings.refuse_unless(
            bool(said) and said[0].startswith("dead"), f"a dead device passes for a living one: {ended.stderr[-300:]}"
        )
    return findings


def errors(device: torch.device) -> None:
    """Each error must arrive, and the engine go on."""
    engine = Engine()

    def failing(depth: int) -> Any:
        return failing(depth - 1) if depth else torch.zeros(2, 3, device=device) @ torch.zeros(2, 3, device=device)

    for depth in DEPTHS:
        fiber = Fiber(str(depth))
        engine.begin(fiber)
        try:
            engine.call(fiber, lambda depth=depth: failing(depth))  # type: ignore[misc]
        except RuntimeError:
            pass
        else:
            raise SystemExit(f"the error at the depth {depth} did not arrive")
        finally:
            engine.end(fiber)
    engine.close()


def assert_on_device(device: torch.device) -> None:
    probe = DeviceProbe(Device("cuda", device))
    try:
        torch.zeros(4, device=device)[torch.tensor([9], device=device)].sum().item()
    except RuntimeError as error:
        print(f"the assert: {type(error).__name__}", flush=True)
    try:
        probe()
    except RuntimeError as error:
        print(f"dead: {type(error).__name__}", flush=True)
    else:
        print("alive", flush=True)


if __name__ == "__main__":
    {"errors": errors, "assert": assert_on_device}[sys.argv[2]](torch.device(sys.argv[1]))
