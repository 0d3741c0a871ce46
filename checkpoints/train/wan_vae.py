"""The untrained VAE of emoji-wan."""

from diffusers import AutoencoderKLWan

from checkpoints.train.clip_latents import LATENT_CHANNELS

PIXEL_PATCH = 2  # the VAE works on 2x2 pixels as one, as Wan2.2's 5B one does: a quarter of the work


def build_vae() -> AutoencoderKLWan:
    """Four times fewer frames, eight times fewer pixels a side; latents are used as they are (mean 0, deviation 1)."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=64,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=3 * PIXEL_PATCH**2,
        out_channels=3 * PIXEL_PATCH**2,
        patch_size=PIXEL_PATCH,
    )
