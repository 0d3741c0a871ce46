"""Tiny autoencoders that several families share, with non-trivial latent statistics, so that errors show."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)

from tests.support.tiny_models.random_weights import diffusers_model

SEED = 5

# How FLUX and SD3 configure AutoencoderKL.
WITHOUT_QUANT_CONV = {"use_quant_conv": False, "use_post_quant_conv": False}
FLUX_LATENTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159, **WITHOUT_QUANT_CONV}
SD3_LATENTS = {"scaling_factor": 1.5305, "shift_factor": 0.0609, **WITHOUT_QUANT_CONV}


def kl_autoencoder(
    latent_channels: int = 4, block_out_channels: tuple[int, ...] = (8, 16), **config: Any
) -> AutoencoderKL:
    """The image autoencoder of most families; halves height and width once per block but the first."""
    num_blocks = len(block_out_channels)
    sizes = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * num_blocks,
        "up_block_types": ("UpDecoderBlock2D",) * num_blocks,
        "block_out_channels": block_out_channels,
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return diffusers_model(AutoencoderKL, seed=SEED, **{**sizes, **config})


def wan_autoencoder(z_dim: int = 16, **config: Any) -> AutoencoderKLWan:
    """8 times smaller in space and 4 times in time; its latent statistics are Wan's own for 16 channels."""
    return diffusers_model(
        AutoencoderKLWan,
        seed=SEED,
        base_dim=4,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **config,
    )


def wan22_autoencoder(z_dim: int, **config: Any) -> AutoencoderKLWan:
    """Wan 2.2's own: 16 times smaller in space and 4 times in time."""
    return wan_autoencoder(
        z_dim,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        **config,
    )


def qwen_autoencoder(z_dim: int = 4, **config: Any) -> AutoencoderKLQwenImage:
    """4 times smaller in space; `z_dim` is a multiple of 4."""
    return diffusers_model(
        AutoencoderKLQwenImage,
        seed=SEED,
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.05] * (z_dim // 4),
        latents_std=[1.1, 0.9, 1.3, 0.8] * (z_dim // 4),
        **config,
    )


def hunyuan_video_autoencoder() -> AutoencoderKLHunyuanVideo:
    """8 times smaller in space and 4 times in time, 4 channels."""
    return diffusers_model(
        AutoencoderKLHunyuanVideo,
        seed=SEED,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        act_fn="silu",
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )


def hunyuan_video_15_autoencoder() -> AutoencoderKLHunyuanVideo15:
    """4 times smaller in space and 2 times in time, 4 channels."""
    return diffusers_model(
        AutoencoderKLHunyuanVideo15,
        seed=SEED,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )


def set_latent_statistics(vae: torch.nn.Module) -> None:
    """Give an autoencoder that keeps its latent statistics in buffers a non-trivial mean and deviation."""
    vae.latents_mean.copy_(torch.linspace(-0.2, 0.2, vae.latents_mean.numel()).view_as(vae.latents_mean))
    vae.latents_std.copy_(torch.linspace(0.8, 1.2, vae.latents_std.numel()).view_as(vae.latents_std))
