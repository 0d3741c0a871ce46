"""The NVIDIA GPUs of this machine, as their driver tells of them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from serve_app.tools.command.exits import CommandError

if TYPE_CHECKING:
    from deployments.plan.cards import Card

ASKED = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
ANSWER_S = 20.0


def device_here() -> str | None:
    """A value of SGLANG_DIFFUSION_TARGET_DEVICE for who has set none; None: the variable's own default."""
    return None if lines_of_driver() else "cpu"


def cards_here() -> list[Card]:
    """In the driver's order; none without a driver."""
    return [card_in(line) for line in lines_of_driver()]


def lines_of_driver() -> list[str]:
    try:
        answer = subprocess.run(ASKED, capture_output=True, encoding="utf-8", timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver, or none that works
        return []
    return [line for line in answer.stdout.splitlines() if line.strip()]


def card_in(line: str) -> Card:
    """A line such as `NVIDIA H200, 143771, 9.0`."""
    from deployments.plan.cards import MIB, Card

    name, memory, capability = (each.strip() for each in line.rsplit(",", 2))
    major, _, minor = capability.partition(".")
    if not memory.isdecimal():  # one that shares the machine's
        raise CommandError(f"nvidia-smi does not tell the memory of {name}: name a size with --gpu, such as 24GB")
    known = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
    return Card(name.removeprefix("NVIDIA ").removeprefix("GeForce "), int(memory) * MIB, known)
