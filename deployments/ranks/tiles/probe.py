"""Latents of which an autoencoder makes several tiles, to learn at the start whether these depend on each other."""

from __future__ import annotations

from typing import Any

import torch

NUM_FRAMES = 3  # of latents: more than the first, which video autoencoders treat apart
TILES = 2  # along the first side
LARGEST = 512  # along a side


def latents_of_tiles(autoencoder: Any) -> torch.Tensor:
    """Zeros for `decode`, [B, C, (F,) H, W] or [B, C, L], on the device and in the dtype of the autoencoder.

    Raises ValueError where its first convolution is not to be found.
    """
    parts = (getattr(autoencoder, name, None) for name in ("post_quant_conv", "decoder"))
    modules = (module for part in parts if isinstance(part, torch.nn.Module) for module in part.modules())
    first: Any = next((module for module in modules if isinstance(module, torch.nn.modules.conv._ConvNd)), None)
    if first is None:
        raise ValueError(f"{type(autoencoder).__name__} has no convolution")
    num_dims = first.weight.dim() - 2
    side = tile_side(autoencoder)
    sides = (TILES * side, side)[: min(num_dims, 2)]
    shape = (1, first.in_channels, *((NUM_FRAMES,) if num_dims == 3 else ()), *sides)
    return torch.zeros(shape, dtype=first.weight.dtype, device=first.weight.device)


def tile_side(autoencoder: Any) -> int:
    """Of the largest tile, in latents: by the sizes that the autoencoder names."""
    ratio = getattr(autoencoder, "spatial_compression_ratio", 8)
    ratio = ratio if isinstance(ratio, int) else 8
    sizes = {n: v for n, v in vars(autoencoder).items() if n.startswith("tile_") and isinstance(v, int) and v > 0}
    latent = [size for name, size in sizes.items() if "latent_min" in name and "frames" not in name]
    sample = [-(-size // ratio) for name, size in sizes.items() if "sample_min" in name and "frames" not in name]
    return min(max([1, *(latent or sample)]), LARGEST // TILES)
