"""The latent space of emoji-wan, fixed before any training: the last frame of each group, and where it came from.

A Wan VAE packs the first frame alone, then each four frames, into one latent frame. Here a latent frame holds 12
principal components of the 8x8 patches of the group's *last* frame, two channels that say where in the picture a cell
is, and two that say which way the emoji moved. As the emoji moves by one cell in each group, every latent frame holds
the same cells at another place: little to learn for the transformer. What lies between two such frames is for the VAE's
decoder to know. It enlarges by repeating pixels, after which the right half of a cell looks like its left half; the
slope of the place channels tells them apart (wan_decoder).
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from checkpoints.train.clips import DIRECTIONS, EMOJI_SIDE, FRAMES, SIDE, Clip, position, render_clip, training_clips
from checkpoints.train.pictures import to_signed

PATCH = 8  # pixels; the VAE's scale factor
GROUP = 4  # frames
CELLS = SIDE // PATCH
LATENT_FRAMES = 1 + (FRAMES - 1) // GROUP
PICTURE_CHANNELS, PLACE_CHANNELS, MOTION_CHANNELS = 12, 2, 2
LATENT_CHANNELS = PICTURE_CHANNELS + PLACE_CHANNELS + MOTION_CHANNELS
PLACE = 0.6  # what the place channels, column and row, grow by from cell to cell; 0 in the middle of the picture
MOTION = 1.5  # the motion channels' value where the emoji is or just was; 0 elsewhere, and in the first frame


def clip_videos(clips: list[Clip]) -> Tensor:
    """Rendered clips, float32 [N, 3, 17, 64, 64] in [-1, 1]."""
    rendered = to_signed(np.stack([render_clip(clip) for clip in clips]))
    return torch.from_numpy(rendered).permute(0, 4, 1, 2, 3).contiguous()


def clip_latents(clips: list[Clip]) -> Tensor:
    """The latents of clips, float32 [N, 16, 5, 8, 8]; 12 channels of picture, then place and motion."""
    last_frames = torch.from_numpy(to_signed(np.stack([render_clip(clip)[::GROUP] for clip in clips])))
    mean, projection = latent_basis()
    cells = (cell_patches(last_frames) - mean) @ projection  # [N, 5, 8, 8, 12]
    motion = torch.stack([_motion(clip.direction) for clip in clips])
    place = PLACE * (torch.arange(CELLS) - (CELLS - 1) / 2)
    places = torch.stack(torch.meshgrid(place, place, indexing="xy"), dim=-1).expand(*cells.shape[:-1], -1)
    return torch.cat([cells, places, motion], dim=-1).permute(0, 4, 1, 2, 3).contiguous()


@cache
def _motion(direction: str) -> Tensor:
    """[5, 8, 8, 2]: the direction (x, y), in the cells that the emoji crossed in each group."""
    motion = torch.zeros(LATENT_FRAMES, CELLS, CELLS, MOTION_CHANNELS)
    for index in range(1, LATENT_FRAMES):
        corners = [position(direction, GROUP * frame) for frame in (index - 1, index)]
        left, top = (min(corner[axis] for corner in corners) // PATCH for axis in (0, 1))
        right, bottom = ((max(corner[axis] for corner in corners) + EMOJI_SIDE) // PATCH for axis in (0, 1))
        motion[index, top:bottom, left:right] = MOTION * torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    return motion


def cell_patches(pictures: Tensor) -> Tensor:
    """[..., 64, 64, 3] -> [..., 8, 8, 192], ordered by colour, row, column."""
    flat = pictures.reshape(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    patches = functional.pixel_unshuffle(flat, PATCH).movedim(1, -1)
    return patches.reshape(*pictures.shape[:-3], CELLS, CELLS, -1)


@cache
def latent_basis(count: int = PICTURE_CHANNELS) -> tuple[Tensor, Tensor]:
    """The patches' mean [192], and the projection [192, count] to scaled principal components.

    The first 12 are in the latents.
    """
    # The cells of a noun are the same in every frame and direction, so the middle frame of each clip has them all.
    pictures = np.stack([render_clip(clip)[FRAMES // 2] for clip in training_clips()])
    patches = cell_patches(torch.from_numpy(to_signed(pictures))).flatten(0, 2)
    mean = patches.mean(dim=0)
    centred = patches - mean
    variances, vectors = torch.linalg.eigh((centred.T @ centred / len(centred)).double())
    variances, vectors = variances.flip(0)[:count], vectors.flip(1)[:, :count]
    vectors = vectors * torch.where(vectors.sum(dim=0) < 0, -1.0, 1.0)  # an eigenvector's sign is arbitrary
    # Halfway to equal variances: fine detail must not drown in the noise, nor weigh as much as the colours.
    projection = vectors * variances**-0.25
    total = (variances[:PICTURE_CHANNELS] ** 0.5).mean().sqrt()
    return mean, (projection / total).float()
