"""AITer's group norm in torch, for machines without an AMD GPU."""

from typing import Any

import torch
import torch.nn.functional as F


class StandInGroupNorm(torch.nn.Module):
    """The constructor and forward of aiter.ops.groupnorm.GroupNorm, which takes contiguous input only."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert affine
        self.num_groups, self.eps = num_groups, eps
        self.weight = torch.nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, use_torch: bool = False) -> torch.Tensor:
        assert x.is_contiguous()
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
