"""The mask of an attention whose sequence and heads are split: of all keys, and of this rank's heads.

diffusers gathers a mask along the keys, but for parts of different lengths it leaves the lengthening inside, and where
the mask has an axis of the heads it leaves all of them, of which a rank has a part.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import gather_size_by_comm

from deployments.ranks.sequence.uneven import gathered


def mend_masks() -> None:
    """From now on diffusers' split attention is given whole masks in this process; of no effect a second time."""
    attend = attention_dispatch._templated_context_parallel_attention
    if hasattr(attend, "__wrapped__"):
        return

    @functools.wraps(attend)
    def with_whole_mask(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *args: Any,
        _parallel_config: Any,
        **kwargs: Any,
    ) -> Any:
        config = _parallel_config.context_parallel_config
        if attn_mask is not None and config.ulysses_degree > 1 and config.ring_degree == 1:
            group = config._ulysses_mesh.get_group()
            attn_mask = whole_mask(attn_mask, key.shape[1], query.shape[2], group, config.ulysses_anything)
        return attend(query, key, value, attn_mask, *args, _parallel_config=_parallel_config, **kwargs)

    attention_dispatch._templated_context_parallel_attention = with_whole_mask


def whole_mask(mask: torch.Tensor, num_keys: int, num_heads: int, group: Any, uneven: bool) -> torch.Tensor:
    """Of shape [batch, 1 or this rank's heads, 1 or queries, all keys]; `num_keys` are this rank's, `num_heads` all."""
    size = dist.get_world_size(group)
    keys = gather_size_by_comm(num_keys, group) if uneven else [num_keys] * size
    # What a rank has by itself says nothing where lengths differ: its one key may be the one of a mask for all keys.
    lengths = gather_size_by_comm(mask.shape[-1], group) if uneven else [mask.shape[-1]] * size
    if lengths == keys:
        mask = gathered(mask, -1, group, keys)
    if mask.ndim == 4 and mask.shape[1] == num_heads > 1:
        mask = mask.chunk(size, 1)[dist.get_rank(group)]
    return mask
