"""Part 8: a hand-off while a long forward runs: whether the copy waits for it, on the default stream and beside it."""

from __future__ import annotations

import threading
import time

import torch

from benchmarks.first_look.part import Findings, Setting, seconds

SIDE = 16_384  # of the matrices that keep the device busy
LONG_S = 1.0
WAITS = 0.5  # of the long work: a copy that takes longer has waited


def look(setting: Setting) -> Findings:
    findings = Findings()
    side = setting.pick(SIDE, 256)
    matrix = torch.randn(side, side, device=setting.device, dtype=setting.dtype)
    one = seconds(setting, lambda: matrix @ matrix)
    times = max(1, min(10_000, round(setting.pick(LONG_S, 0.02) / one)))
    result = torch.randn(16 * 128 * 128, device=setting.device)
    for name in ("default stream", "side stream, pinned") if setting.device.type == "cuda" else ("default stream",):
        waited = copied_beside(setting, matrix, times, result, name != "default stream")
        told = f"a copy beside {times * one:.2f} s of work, {name}: {1000 * waited:.1f} ms"
        findings.note(name, waited, told)
        if name != "default stream":
            findings.refuse_unless(
                waited < WAITS * times * one, f"{told}: it waits although it has a stream of its own"
            )
    return findings


def copied_beside(setting: Setting, matrix: torch.Tensor, times: int, result: torch.Tensor, beside: bool) -> float:
    """Seconds that the copy takes in its own thread."""
    setting.synchronize()
    took: list[float] = []

    def copy() -> None:
        began = time.perf_counter()
        if beside:
            pinned = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                pinned.copy_(result, non_blocking=True)
            stream.synchronize()
        else:
            result.to("cpu")
        took.append(time.perf_counter() - began)

    if beside:
        copy()  # pinned memory and a stream are made once
        took.clear()
    for _ in range(times):
        torch.matmul(matrix, matrix)
    thread = threading.Thread(target=copy)
    thread.start()
    thread.join()
    setting.synchronize()
    return took[0]
