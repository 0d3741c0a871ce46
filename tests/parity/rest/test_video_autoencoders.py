"""Autoencoders of videos in chunks of frames and in tiles."""

from __future__ import annotations

import torch

from tests.support.fitting_autoencoder import Prepared
from tests.support.tiny_models.autoencoders import hunyuan_video_autoencoder, wan_autoencoder

PLENTY = 10**11


def test_long_videos_come_in_chunks_of_frames_where_the_autoencoder_can() -> None:
    """HunyuanVideo's own default; its decoder then never sees all frames."""
    prepared = Prepared(hunyuan_video_autoencoder, 0)
    frames = [shape[2] for shape in prepared.decode(1, 4, 17, 4, 4)]
    assert max(frames) < 17


def test_a_video_in_tiles_has_all_its_frames_and_pixels() -> None:
    sizes = {f"tile_sample_{each}_{axis}": 32 for each in ("min", "stride") for axis in ("height", "width")}
    whole, tiled = (Prepared(wan_autoencoder, free, tile=sizes).vae for free in (PLENTY, 0))
    latents = torch.randn(1, 16, 3, 6, 6, generator=torch.manual_seed(0))
    with torch.no_grad():
        assert whole.decode(latents).sample.shape == tiled.decode(latents).sample.shape
