"""The bytes that a call holds at a time are counted without computing anything."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from deployments.memory.activations import decode_bytes, peak_bytes, tensors_of
from tests.support.tiny_models.autoencoders import kl_autoencoder


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_what_lives_at_a_time_counts_and_what_is_gone_does_not() -> None:
    given = empty(100)

    def call() -> torch.Tensor:
        first = given + 1  # 400 bytes
        second = torch.cat([first, first])  # 800 bytes more
        del first
        return second[:10] * 2  # 40 bytes beside the 800

    assert peak_bytes(call, [given]) == 1200


def test_a_view_takes_nothing_and_weights_are_there_before() -> None:
    layer = torch.nn.Linear(10, 10, device="meta")
    given = empty(5, 10)
    assert peak_bytes(lambda: layer(given).view(-1)[3:], [*tensors_of(layer), given]) == 200


def test_attention_counts_as_a_fused_kernel() -> None:
    heads = empty(1, 2, 1000, 8)
    counted = peak_bytes(lambda: F.scaled_dot_product_attention(heads, heads, heads), [heads])
    assert counted == 2 * 1000 * 8 * 4


def test_a_mask_is_asked_whether_it_may_be_left_out_and_counts() -> None:
    mask = torch.empty(8, dtype=torch.bool, device="meta")
    assert peak_bytes(lambda: None if mask.all() else mask.float(), [mask]) >= 8 * 4


def test_a_decoding_by_tiles_needs_less_and_four_times_the_pixels_four_times_as_much() -> None:
    vae = kl_autoencoder().to("meta")
    small, large = (decode_bytes(vae, (1, 4, size, size), torch.float32) for size in (16, 32))
    assert 3.9 < large / small < 4.1
    vae.use_tiling, vae.tile_overlap_factor = True, 0
    assert decode_bytes(vae, (1, 4, 32, 32), torch.float32) < large / 2


def test_the_bytes_are_those_of_the_audit() -> None:
    """FLUX's own autoencoder in bfloat16, a picture of 1024 by 1024: 1.61 GB, as counted before and apart."""
    config: Any = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    with torch.device("meta"):
        vae = AutoencoderKL(**config).to(torch.bfloat16)
    assert decode_bytes(vae, (1, 16, 128, 128), torch.bfloat16) == 1_610_612_736
