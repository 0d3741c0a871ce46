"""Tiny autoencoders of every kind that decodes in tiles, with tiles so small that a few latents are several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanImage,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    AutoencoderOobleck,
    AutoencoderTiny,
)

from deployments.ranks.tiles.probe import latents_of_tiles
from tests.support.tiny_models.autoencoders import (
    hunyuan_video_15_autoencoder,
    hunyuan_video_autoencoder,
    kl_autoencoder,
    qwen_autoencoder,
    wan22_autoencoder,
    wan_autoencoder,
)
from tests.support.tiny_models.flux2 import _autoencoder as flux2_autoencoder
from tests.support.tiny_models.ltx import _ltx2_autoencoder as ltx2_autoencoder
from tests.support.tiny_models.ltx import ltx_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.sana import _deep_compression_autoencoder as deep_compression_autoencoder

SMALLER = 8  # so much smaller than the class's own tiles


def cogvideox_autoencoder() -> Any:
    return diffusers_model(
        AutoencoderKLCogVideoX,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=512,
        sample_width=512,
    )


def mochi_autoencoder() -> Any:
    channels = (32, 32, 32, 32)
    return diffusers_model(
        AutoencoderKLMochi,
        latent_channels=12,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        layers_per_block=(1, 1, 1, 1, 1),
    )


def magvit_autoencoder() -> Any:
    return diffusers_model(
        AutoencoderKLMagvit,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )


def hunyuan_image_autoencoder() -> Any:
    return diffusers_model(
        AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=256,
    )


def oobleck_autoencoder() -> Any:
    return diffusers_model(
        AutoencoderOobleck,
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )


def allegro_autoencoder() -> Any:
    autoencoder = diffusers_model(
        AutoencoderKLAllegro,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    autoencoder.kernel, autoencoder.stride = (24, 32, 32), (16, 16, 16)  # frames, height, width of its only tile
    return autoencoder


def taesd_autoencoder() -> Any:
    blocks, channels = (1, 1, 1, 1), (8, 8, 8, 8)
    return diffusers_model(
        AutoencoderTiny,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )


TILED: dict[str, Callable[[], Any]] = {
    "AutoencoderKL": kl_autoencoder,
    "Wan 2.1": wan_autoencoder,
    "Wan 2.2": lambda: wan22_autoencoder(16),
    "Qwen-Image": qwen_autoencoder,
    "HunyuanVideo": hunyuan_video_autoencoder,
    "HunyuanVideo 1.5": hunyuan_video_15_autoencoder,
    "HunyuanImage": hunyuan_image_autoencoder,
    "CogVideoX": cogvideox_autoencoder,
    "Mochi": mochi_autoencoder,
    "LTX": lambda: ltx_autoencoder(timestep_conditioning=False),
    "LTX 2": ltx2_autoencoder,
    "FLUX.2": flux2_autoencoder,
    "DC": deep_compression_autoencoder,
    "Oobleck": oobleck_autoencoder,
    "Allegro": allegro_autoencoder,
    "TAESD": taesd_autoencoder,
}


def tiled(make: Callable[[], Any]) -> Any:
    """The autoencoder with tiling on, by small tiles."""
    autoencoder = make().eval()
    autoencoder.use_tiling = True
    for name, value in list(vars(autoencoder).items()):
        if name.startswith("tile_") and isinstance(value, int) and "frames" not in name and value >= 2 * SMALLER:
            setattr(autoencoder, name, value // SMALLER)
    return autoencoder


def latents_for(autoencoder: Any) -> torch.Tensor:
    """Of several tiles."""
    shape = latents_of_tiles(autoencoder).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
