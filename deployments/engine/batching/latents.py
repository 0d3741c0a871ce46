"""The noisy latents among a forward's arguments: how many positions the model works on, and their shape for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from deployments.tensors.arguments import LATENT_PARAMETERS
from deployments.tensors.values import tensors

SPATIAL_PATCHES = ("patch_size", "all_patch_size")  # of a module's config, the first that it has
TEMPORAL_PATCHES = ("patch_size_t", "temporal_patch_size", "all_f_patch_size")


def tokens_per_sample(arguments: dict[str, Any], module: Any, num_samples: int) -> int:
    """Positions of the noisy latents that one sample brings: of a grid [C, (F,) H, W], one for each patch."""
    config = getattr(module, "config", None)
    total = sum(_positions(tensor, is_item, config) for tensor, is_item in _latents(arguments))
    return max(1, total // max(1, num_samples))


def shape_of_sample(arguments: dict[str, Any]) -> str:
    """For people, "4096x64": of the latents without the axis of the batch."""
    for tensor, is_item in _latents(arguments):
        return "x".join(map(str, tensor.shape if is_item else tensor.shape[1:]))
    return ""


def _latents(arguments: dict[str, Any]) -> list[tuple[torch.Tensor, bool]]:
    """Each with whether it is one item of a list of samples, without an axis of the batch."""
    for name in LATENT_PARAMETERS:
        found = [tensor for tensor in tensors(arguments.get(name)) if tensor.ndim]
        if found:
            is_list = not isinstance(arguments[name], torch.Tensor)
            return [(tensor, is_list) for tensor in found]
    others: Iterable[Any] = tensors(arguments)
    largest = max((t for t in others if t.is_floating_point() and t.ndim), key=torch.Tensor.numel, default=None)
    return [] if largest is None else [(largest, False)]


def _positions(tensor: torch.Tensor, is_item: bool, config: Any) -> int:
    """Of all samples in it."""
    batch: int = 1 if is_item else tensor.shape[0]
    axes: list[int] = list(tensor.shape if is_item else tensor.shape[1:])
    if not axes:
        return batch
    axes.pop(_channel_axis(axes, getattr(config, "in_channels", None)))
    positions: int = batch * math.prod(axes)
    return positions // _patch(config, axes) if len(axes) > 1 else positions


def _channel_axis(axes: list[int], in_channels: Any) -> int:
    """The axis that has the model's channels; else the last of a sequence [N, C] and the first of a grid [C, H, W]."""
    likely: tuple[int, ...] = (-1, 0) if len(axes) <= 2 else (0, -1, *range(1, len(axes) - 1))
    return next((axis for axis in likely if axes[axis] == in_channels), likely[0])


def _patch(config: Any, axes: list[int]) -> int:
    """Positions of the grid that make one token."""
    spatial, temporal = _of(config, SPATIAL_PATCHES), _of(config, TEMPORAL_PATCHES)
    if isinstance(spatial, list | tuple) and len(spatial) > 1:
        return max(1, math.prod(map(int, spatial[-len(axes) :])))
    side = int(spatial[0] if isinstance(spatial, list | tuple) else spatial)
    frames = int(temporal[0] if isinstance(temporal, list | tuple) else temporal)
    return max(1, side * side * (frames if len(axes) > 2 else 1))


def _of(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), 1)
