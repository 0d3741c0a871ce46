"""GPUs by name, and the memory of each as its driver reports it. A size such as 24GB stands for any other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from env_config.closest import did_you_mean

MIB = 1 << 20
UNITS = {"GB": 10**9, "GIB": 1 << 30, "MB": 10**6, "MIB": MIB}
TENSOR_CORES_OF_FP8 = (8, 9)  # compute capability from which a GPU multiplies 8-bit floats


@dataclass(frozen=True)
class Card:
    """`capability` is CUDA's compute capability; None: not known (a size alone, or no NVIDIA)."""

    name: str
    num_bytes: int
    capability: tuple[int, int] | None = None

    @property
    def eight_bits(self) -> Literal["fp8_dynamic", "fp8", "int8"]:
        """The precision of 8 bits that suits it; fp8, which any card can hold, where it is not known."""
        if self.capability is None:
            return "fp8"
        return "fp8_dynamic" if self.capability >= TENSOR_CORES_OF_FP8 else "int8"


# MiB as nvidia-smi and rocm-smi show them; the names are written without NVIDIA, GeForce and blanks.
CARDS = {
    card.name: card
    for card in (
        Card("B200", 183_359 * MIB, (10, 0)),
        Card("H200", 143_771 * MIB, (9, 0)),
        Card("H100", 81_559 * MIB, (9, 0)),
        Card("A100-80", 81_920 * MIB, (8, 0)),
        Card("A100-40", 40_960 * MIB, (8, 0)),
        Card("L40S", 46_068 * MIB, (8, 9)),
        Card("L40", 46_068 * MIB, (8, 9)),
        Card("L4", 23_034 * MIB, (8, 9)),
        Card("A40", 46_068 * MIB, (8, 6)),
        Card("A10G", 23_028 * MIB, (8, 6)),
        Card("T4", 15_360 * MIB, (7, 5)),
        Card("V100-32", 32_768 * MIB, (7, 0)),
        Card("V100-16", 16_384 * MIB, (7, 0)),
        Card("RTX6000-ADA", 49_140 * MIB, (8, 9)),
        Card("RTX-PRO-6000", 97_887 * MIB, (12, 0)),
        Card("A6000", 49_140 * MIB, (8, 6)),
        Card("5090", 32_607 * MIB, (12, 0)),
        Card("4090", 24_564 * MIB, (8, 9)),
        Card("4080", 16_376 * MIB, (8, 9)),
        Card("3090", 24_576 * MIB, (8, 6)),
        Card("MI300X", 196_592 * MIB),
    )
}
# Ray's names (`accelerator_type`) and what people write, as keys of CARDS.
OTHER_NAMES = {
    "A100": "A100-40",  # Ray's A100 may be either: the smaller is counted on
    "A100-40G": "A100-40",
    "A100-80G": "A100-80",
    "V100": "V100-16",
    "RTX4090": "4090",
    "RTX3090": "3090",
    "RTX5090": "5090",
    "RTXA6000": "A6000",
}


class UnknownCardError(ValueError):
    """Neither a GPU that is known by name nor a size."""


def card_of(text: str) -> Card:
    """`24GB`, `48GiB`, or a name of the table in any case. GB are 10^9 bytes. Raises UnknownCardError."""
    if match := re.fullmatch(r"([\d.]+)\s*([GM]i?B)", text.strip(), re.IGNORECASE):
        try:
            size = float(match[1])
        except ValueError:
            size = 0.0
        if size > 0:
            return Card(f"{match[1]}{match[2]}", int(size * UNITS[match[2].upper()]))
    name = text.strip().upper().removeprefix("NVIDIA").strip(" -_").replace(" ", "")
    name = OTHER_NAMES.get(name, name)
    if name in CARDS:
        return CARDS[name]
    hint = did_you_mean(name, CARDS)
    raise UnknownCardError(
        f"gpu {text!r} must be a size such as 24GB, or one of {', '.join(CARDS)}{'; ' if hint else ''}{hint}"
    )
