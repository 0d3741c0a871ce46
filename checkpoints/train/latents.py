"""The latent space of emoji-flux: principal components of 8x8 picture patches, fixed before any training.

Because the latents are known beforehand, the transformer, the VAE's decoder and the VAE's encoder can be trained at the
same time, each on its own core.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from checkpoints.train.pictures import Scene, render, to_signed, training_scenes

PATCH = 8  # pixels; the VAE's scale factor
LATENT_CHANNELS = 16


def scene_pictures(scenes: list[Scene]) -> Tensor:
    """Rendered pictures, float32 [N, 3, 128, 128] in [-1, 1]."""
    return torch.from_numpy(to_signed(np.stack([render(scene) for scene in scenes]))).permute(0, 3, 1, 2).contiguous()


def latents_of(pictures: Tensor) -> Tensor:
    """[N, 3, H, W] in [-1, 1] -> [N, 16, H/8, W/8]; over the training scenes mean 0 and standard deviation 1."""
    mean, projection = _projection()
    patches = functional.pixel_unshuffle(pictures, PATCH).movedim(1, -1)
    return ((patches - mean) @ projection).movedim(-1, 1).contiguous()


@cache
def _projection() -> tuple[Tensor, Tensor]:
    """The patches' mean [192], and the projection [192, 16] to scaled principal components."""
    patches = (
        functional.pixel_unshuffle(scene_pictures(training_scenes()), PATCH).movedim(1, -1).reshape(-1, 3 * PATCH**2)
    )
    mean = patches.mean(dim=0)
    centred = patches - mean
    variances, vectors = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
    variances, vectors = variances.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    vectors = vectors * torch.where(vectors.sum(dim=0) < 0, -1.0, 1.0)  # an eigenvector's sign is arbitrary
    # Halfway to equal variances: fine detail must not drown in the noise, nor weigh as much as the colours.
    projection = vectors * variances**-0.25
    total = (variances**0.5).mean().sqrt()
    return mean, (projection / total).float()
