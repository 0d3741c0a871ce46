"""Parts of different lengths: cut as cache-dit's plans cut the masks that belong to them, and gathered by gloo too.

cache-dit cuts a sequence by `tensor_split`, but the masks of HunyuanVideo and HunyuanImage by `chunk`. From three ranks
on the two differ: 10 are 3, 3, 2, 2 or 3, 3, 3, 1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from deployments.ranks.sequence.uneven import gathered


def split_uneven_parts() -> None:
    """From now on cache-dit's hooks do so in this process."""
    from cache_dit.distributed.core import _context_parallel

    _context_parallel._all_gather_anything = gathered
    _context_parallel._PartitionAnythingSharder.shard_anything = staticmethod(part_of)


def part_of(tensor: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's. Raises ValueError, on all ranks, where one would have none."""
    parts = tensor.chunk(mesh.size(), dim)
    if len(parts) < mesh.size():
        raise ValueError(f"a length of {tensor.shape[dim]} is too short for {mesh.size()} ranks")
    return parts[dist.get_rank(mesh.get_group())]
