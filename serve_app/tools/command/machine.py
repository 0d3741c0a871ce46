"""The NVIDIA GPUs of this machine that CUDA may use, as their driver tells of them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from serve_app.tools.command.exits import CommandError

if TYPE_CHECKING:
    from deployments.plan.cards import Card

ASKED = ["nvidia-smi", "--query-gpu=uuid,name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
ANSWER_S = 20.0
SLICE = "MIG-"


def device_here() -> str | None:
    """A value of SGLANG_DIFFUSION_TARGET_DEVICE for who has set none; None: the variable's own default."""
    return None if lines_of_driver() else "cpu"


def cards_here() -> list[Card]:
    """In the order of CUDA_VISIBLE_DEVICES, else the driver's; none without a driver. Raises CommandError."""
    return [card_in(line) for line in lines_of_driver()]


def lines_of_driver() -> list[str]:
    """Name, memory and compute capability of each GPU that may be used. Raises CommandError."""
    from env_config.section import read_environ

    try:
        answer = subprocess.run(ASKED, capture_output=True, encoding="utf-8", timeout=ANSWER_S, check=True)
    except (OSError, subprocess.SubprocessError):  # no driver, or none that works
        return []
    return visible([line for line in answer.stdout.splitlines() if line.strip()], read_environ())


def visible(lines: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Of lines that begin with a UUID those that CUDA_VISIBLE_DEVICES leaves, without it, as CUDA reads the variable.

    Raises CommandError for what CUDA would leave out without a word, and for what the driver does not tell of.
    """
    cards = [tuple(line.split(", ", 1)) for line in lines]
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [about for _, about in cards]
    are_alike = len({about for _, about in cards}) <= 1
    are_numbered = are_alike or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"  # as CUDA numbers them
    found: list[str] = []
    for name in (each.strip() for each in names.split(",")):
        if name in ("", "-1", "NoDevFiles"):  # CUDA reads no further; the last is what Ray sets where it grants none
            break
        if name.startswith(SLICE):
            raise CommandError(
                f"CUDA_VISIBLE_DEVICES={names}: nvidia-smi does not tell the size of {name}: name one with --gpu"
            )
        if name.isdecimal():
            chosen = [about for _, about in cards[int(name) :][:1]]
        else:
            chosen = [about for uuid, about in cards if uuid.startswith(name)]
        if len(chosen) != 1:
            raise CommandError(
                f"CUDA_VISIBLE_DEVICES={names}: {name} is {len(chosen)} of the {len(cards)} GPUs of this machine"
            )
        if name.isdecimal() and not are_numbered:
            raise CommandError(
                f"CUDA_VISIBLE_DEVICES={names}: the GPUs of this machine differ, and CUDA numbers them otherwise than "
                "nvidia-smi: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name UUIDs (nvidia-smi -L)"
            )
        found += chosen
    return found


def card_in(line: str) -> Card:
    """A line such as `NVIDIA H200, 143771, 9.0`."""
    from deployments.plan.cards import MIB, Card

    name, memory, capability = (each.strip() for each in line.rsplit(",", 2))
    major, _, minor = capability.partition(".")
    if not memory.isdecimal():  # one that shares the machine's
        raise CommandError(f"nvidia-smi does not tell the memory of {name}: name a size with --gpu, such as 24GB")
    known = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
    return Card(name.removeprefix("NVIDIA ").removeprefix("GeForce "), int(memory) * MIB, known)
