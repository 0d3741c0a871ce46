"""Latents of which an autoencoder makes several tiles, to learn at the start whether these depend on each other."""

from __future__ import annotations

from typing import Any

import torch

NUM_FRAMES = 3  # of latents: more than the first, which video autoencoders treat apart
TILES = 2  # along the first side
LARGEST = 512  # along a side
RATIO = 8  # of pixels to latents, where an autoencoder does not say


def latents_of_tiles(autoencoder: Any) -> torch.Tensor:
    """Zeros for `decode`, [B, C, (F,) H, W] or [B, C, L], on the device and in the dtype of the autoencoder.

    Raises ValueError where its convolutions are not to be found.
    """
    parts = (getattr(autoencoder, name, None) for name in ("post_quant_conv", "decoder"))
    modules = (module for part in parts if isinstance(part, torch.nn.Module) for module in part.modules())
    convolutions: list[Any] = [module for module in modules if isinstance(module, torch.nn.modules.conv._ConvNd)]
    if not convolutions:
        raise ValueError(f"{type(autoencoder).__name__} has no convolution")
    first, num_dims = convolutions[0], max(each.weight.dim() for each in convolutions) - 2
    side = tile_side(autoencoder)
    sides = (TILES * side, side)[: min(num_dims, 2)]
    shape = (1, first.in_channels, *((tile_frames(autoencoder),) if num_dims == 3 else ()), *sides)
    return torch.zeros(shape, dtype=first.weight.dtype, device=first.weight.device)


def tile_side(autoencoder: Any) -> int:
    """Of the largest tile, in latents: by the sizes that the autoencoder names."""
    ratio = ratio_of(autoencoder, "spatial_compression_ratio")
    sizes = {n: v for n, v in vars(autoencoder).items() if n.startswith("tile_") and isinstance(v, int) and v > 0}
    latent = [size for name, size in sizes.items() if "latent_min" in name and "frames" not in name]
    sample = [-(-size // ratio) for name, size in sizes.items() if "sample_min" in name and "frames" not in name]
    side: int = max([1, *(latent or sample or kernel_of(autoencoder)[1:])])
    return min(side, LARGEST // TILES)


def tile_frames(autoencoder: Any) -> int:
    return max(NUM_FRAMES, *kernel_of(autoencoder)[:1])


def kernel_of(autoencoder: Any) -> tuple[int, ...]:
    """Frames, height and width of a tile in latents, where an autoencoder has one size only (Allegro's `kernel`)."""
    kernel = getattr(autoencoder, "kernel", None)
    if not isinstance(kernel, tuple) or len(kernel) != 3:
        return (1,)
    frames, *sides = kernel
    ratio = ratio_of(autoencoder, "spatial_compression_ratio")
    return (frames // ratio_of(autoencoder, "temporal_compression_ratio"), *(side // ratio for side in sides))


def ratio_of(autoencoder: Any, name: str) -> int:
    found = getattr(autoencoder, name, None) or getattr(getattr(autoencoder, "config", None), name, None)
    return found if isinstance(found, int) else RATIO
