"""Parts of different lengths gathered from all ranks: each is sent as long as the longest, and cut where it arrives.

diffusers hands parts of different lengths to one collective, which gloo refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import context_parallel
from diffusers.models._modeling_parallel import gather_size_by_comm
from torch.nn.functional import pad


def gather_uneven_parts() -> None:
    """From now on diffusers' hooks do so in this process."""
    context_parallel._all_gather_anything = gathered


def gathered(part: torch.Tensor, dim: int, group: Any, sizes: Sequence[int] | None = None) -> torch.Tensor:
    """The whole, from each rank's part along `dim`. Waits for all ranks; None: they are asked for their sizes too."""
    sizes = sizes or gather_size_by_comm(part.shape[dim], group)
    sent = lengthened(part, dim, max(sizes)).contiguous()
    parts = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(parts, sent, group=group)
    return torch.cat([each.narrow(dim, 0, size) for each, size in zip(parts, sizes, strict=True)], dim)


def lengthened(part: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    behind = [0, 0] * (part.ndim - 1 - dim % part.ndim)
    return pad(part, [*behind, 0, length - part.shape[dim]])
