"""How a denoiser can be split over ranks, asked of its class without its weights."""

from __future__ import annotations

from typing import Any

import torch

from deployments.plan.ranks import DEGREES
from deployments.ranks.splits import SPLITS
from deployments.ranks.weights import split_parameters

CARD = torch.device("cuda")  # where a plan is for; nothing is put there


def ways_of(module: Any) -> dict[str, tuple[int, ...]]:
    """The numbers of ranks that each way can have; `batch`, which has any, is left out."""
    found = {
        way: tuple(degree for degree in DEGREES if split.problem(module, degree, CARD) is None)
        for way, split in SPLITS.items()
        if split.install is not None
    }
    return {way: degrees for way, degrees in found.items() if degrees}


def tensor_bytes(module: Any) -> int:
    """What `tensor` splits of the module's weights; 0 where it has no plan."""
    return sum(each.numel() * each.element_size() for each in split_parameters(module))
