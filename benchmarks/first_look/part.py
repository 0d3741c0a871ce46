"""A part of the first look: what it is given, and what it finds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """`is_small`: a rehearsal on whatever device there is, with sizes that a CPU manages."""

    device: torch.device
    is_small: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def pick(self, usual: Any, small: Any) -> Any:
        return small if self.is_small else usual

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass
class Findings:
    """`figures` go into the JSON, `lines` onto the page; `wrong` is the sentence that stops the look."""

    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    wrong: str | None = None

    def note(self, name: str, value: Any, told: str) -> None:
        self.figures[name] = value
        self.lines.append(told)

    def refuse_unless(self, holds: bool, sentence: str) -> None:
        """The first thing that is wrong stays."""
        if not holds and self.wrong is None:
            self.wrong = sentence


def seconds(setting: Setting, work: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
    """Of one call, the median; the device is idle before and after each."""
    found = []
    for number in range(warm + repeats):
        setting.synchronize()
        began = time.perf_counter()
        work()
        setting.synchronize()
        if number >= warm:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def peak_bytes(setting: Setting, work: Callable[[], Any]) -> tuple[int, int] | None:
    """Allocated and reserved beside what was there before; None where the device does not count."""
    if setting.device.type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - reserved


def deviations(merged: torch.Tensor, alone: torch.Tensor) -> tuple[float, float]:
    """Largest difference by the largest value, and relative L2."""
    a, b = merged.float(), alone.float()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)), float(
        (a - b).norm() / b.norm().clamp_min(1e-12)
    )


def gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
