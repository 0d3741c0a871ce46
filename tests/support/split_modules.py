"""Tiny denoisers whose sequence diffusers can split, each with the arguments of one forward; every length is even."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HeliosTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)

from tests.support.tiny_models.random_weights import diffusers_model

Arguments = dict[str, Any]


@dataclass(frozen=True)
class SplitModule:
    """`arguments` takes the number of tokens of the picture or video, and of the text."""

    build: Callable[[], torch.nn.Module]
    arguments: Callable[[int, int], Arguments]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(tokens: int, axes: int) -> torch.Tensor:
    return torch.stack([torch.arange(tokens) % (axis + 2) for axis in range(axes)], -1).float()


def padded(text: int, padding: int = 3) -> torch.Tensor:
    """The mask of a text whose last tokens mean nothing."""
    return (torch.arange(text) < text - padding)[None]


def flux() -> torch.nn.Module:
    return diffusers_model(
        FluxTransformer2DModel,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def of_flux(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, tokens, 4),
        "encoder_hidden_states": noise(1, text, 16, seed=1),
        "pooled_projections": noise(1, 16, seed=2),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids(tokens, 3),
        "txt_ids": ids(text, 3),
    }


def flux2() -> torch.nn.Module:
    return diffusers_model(
        Flux2Transformer2DModel,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )


def of_flux2(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, tokens, 4),
        "encoder_hidden_states": noise(1, text, 16, seed=1),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": ids(tokens, 4)[None],
        "txt_ids": ids(text, 4)[None],
    }


def qwen_image() -> torch.nn.Module:
    return diffusers_model(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def of_qwen_image(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, tokens, 16),
        "encoder_hidden_states": noise(1, text, 16, seed=1),
        "encoder_hidden_states_mask": padded(text),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 1, tokens)]],
    }


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 32,
    "num_layers": 2,
}


def wan() -> torch.nn.Module:
    return diffusers_model(WanTransformer3DModel, **WAN, rope_max_seq_len=64)


def of_wan(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, 16, 1, 2, 2 * tokens),
        "encoder_hidden_states": noise(1, text, 32, seed=1),
        "timestep": torch.tensor([500]),
    }


def of_wan_with_a_picture(tokens: int, text: int) -> Arguments:
    """A time for each token, as Wan 2.2 5B has it."""
    times = torch.where(torch.arange(tokens) < 2, 0, 500)[None]
    return of_wan(tokens, text) | {"timestep": times}


def chronoedit() -> torch.nn.Module:
    return diffusers_model(ChronoEditTransformer3DModel, **WAN, image_dim=8, rope_max_seq_len=64)


def of_chronoedit(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, 16, 2, 2, tokens),
        "encoder_hidden_states": noise(1, text, 32, seed=1),
        "encoder_hidden_states_image": noise(1, 5, 8, seed=2),
        "timestep": torch.tensor([500]),
    }


def helios() -> torch.nn.Module:
    return diffusers_model(
        HeliosTransformer3DModel,
        **WAN,
        rope_dim=(4, 4, 4),
        has_multi_term_memory_patch=True,
        guidance_cross_attn=True,
        zero_history_timestep=True,
        is_amplify_history=False,
    )


def of_helios(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, 16, 1, 2, 2 * tokens),
        "encoder_hidden_states": noise(1, text, 32, seed=1),
        "timestep": torch.tensor([500]),
    }


def ltx() -> torch.nn.Module:
    return diffusers_model(
        LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )


def of_ltx(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, tokens, 8),
        "encoder_hidden_states": noise(1, text, 32, seed=1),
        "encoder_attention_mask": padded(text).long(),
        "timestep": torch.tensor([500]),
        "num_frames": 1,
        "height": 1,
        "width": tokens,
    }


def of_ltx_with_a_picture(tokens: int, text: int) -> Arguments:
    times = torch.where(torch.arange(tokens) < 2, 0, 500)[None]
    return of_ltx(tokens, text) | {"timestep": times}


def ltx2(rope_type: str = "split") -> torch.nn.Module:
    return diffusers_model(
        LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=4,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
        rope_double_precision=False,
        rope_type=rope_type,
    )


def ltx2_interleaved() -> torch.nn.Module:
    return ltx2("interleaved")


def of_ltx2(tokens: int, text: int) -> Arguments:
    return {
        "hidden_states": noise(1, tokens, 4),
        "audio_hidden_states": noise(1, 5, 4, seed=3),
        "encoder_hidden_states": noise(1, text, 32, seed=1),
        "audio_encoder_hidden_states": noise(1, text, 32, seed=2),
        "encoder_attention_mask": padded(text).long(),
        "audio_encoder_attention_mask": padded(text).long(),
        "timestep": torch.tensor([500.0]),
        "sigma": torch.tensor([0.5]),
        "num_frames": 1,
        "height": 1,
        "width": tokens,
        "audio_num_frames": 5,
    }


def of_ltx2_with_a_picture(tokens: int, text: int) -> Arguments:
    times = torch.where(torch.arange(tokens) < 2, 0.0, 500.0)[None]
    return of_ltx2(tokens, text) | {"timestep": times, "audio_timestep": torch.tensor([500.0])}


def minimax() -> torch.nn.Module:
    return diffusers_model(
        MiniMaxH3Transformer3DModel,
        num_attention_heads=4,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=32,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def of_minimax(tokens: int, text: int) -> Arguments:
    """The text, two rows of sound, the video."""
    rows = torch.arange(text + 2 + tokens)
    tags = torch.where(rows < text, 1, torch.where(rows < text + 2, 2, 0))
    return {
        "hidden_states": noise(1, tokens, 16),
        "audio_hidden_states": noise(1, 2, 4, seed=2),
        "encoder_hidden_states": noise(1, text, 16, seed=1),
        "timestep": torch.tensor([0.0, 0.5]),
        "timestep_indices": (rows >= text).long(),
        "token_tags": tags,
        "position_ids": ids(len(rows), 3),
        "video_indices": rows[text + 2 :],
        "audio_indices": rows[text : text + 2],
        "text_indices": rows[:text],
    }


SPLIT_MODULES = {
    "flux": SplitModule(flux, of_flux),
    "flux2": SplitModule(flux2, of_flux2),
    "qwen_image": SplitModule(qwen_image, of_qwen_image),
    "wan": SplitModule(wan, of_wan),
    "wan_with_a_picture": SplitModule(wan, of_wan_with_a_picture),
    "chronoedit": SplitModule(chronoedit, of_chronoedit),
    "helios": SplitModule(helios, of_helios),
    "ltx": SplitModule(ltx, of_ltx),
    "ltx_with_a_picture": SplitModule(ltx, of_ltx_with_a_picture),
    "ltx2": SplitModule(ltx2, of_ltx2),
    "ltx2_with_a_picture": SplitModule(ltx2, of_ltx2_with_a_picture),
    "ltx2_interleaved": SplitModule(ltx2_interleaved, of_ltx2),
    "minimax": SplitModule(minimax, of_minimax),
}
