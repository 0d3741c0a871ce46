"""The untrained parts of emoji-flux beside its VAE, and how a batch of prompts is encoded in training."""

import math
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from checkpoints.train.latents import LATENT_CHANNELS
from checkpoints.train.prompts import words
from checkpoints.train.tokenizers import CLIP_MAX_LENGTH, T5_MAX_LENGTH, clip_tokenizer, t5_tokenizer

TEXT_WIDTH = 128
TOKENS_PER_SIDE = 8  # 128 pixels / 8 (VAE) / 2 (packing)


class FluxParts(nn.Module):
    """The two text encoders, their tokenizers and the transformer, trained together."""

    def __init__(self, heads: int = 6, double_blocks: int = 2, single_blocks: int = 4) -> None:
        super().__init__()
        self.clip_tokenizer: CLIPTokenizer = clip_tokenizer()
        self.t5_tokenizer: T5TokenizerFast = t5_tokenizer(words())
        self.clip = CLIPTextModel(_clip_config(self.clip_tokenizer))
        self.t5 = T5EncoderModel(_t5_config(self.t5_tokenizer))
        # Without a position bias all padding tokens stay equal to each other, so that one stands for all (see
        # `encode`). Word order reaches the model through CLIP.
        position_bias = self.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        nn.init.zeros_(position_bias)
        position_bias.requires_grad_(False)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            attention_head_dim=32,
            num_attention_heads=heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(4, 14, 14),
        )

    def forward(self, noisy: Tensor, sigma: Tensor, prompts: list[str], padded_length: int) -> Tensor:
        """The predicted velocity, [B, 64, 64] like `noisy`; sigma is [B], in (0, 1]."""
        text = self.encode(prompts, padded_length)
        image_keys = torch.zeros(len(prompts), noisy.shape[1], device=noisy.device)
        key_bias = torch.cat([text.key_bias, image_keys], dim=1)[:, None, None, :]
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            timestep=sigma,
            img_ids=image_ids().to(noisy.device),
            txt_ids=torch.zeros(text.tokens.shape[1], 3, device=noisy.device),
            joint_attention_kwargs={"attention_mask": key_bias},
            return_dict=False,
        )[0]
        return velocity

    def encode(self, prompts: list[str], padded_length: int) -> "EncodedText":
        """What FluxPipeline computes for `prompts` padded to `padded_length` T5 tokens, at the cost of the real tokens.

        FLUX masks no padding: each of the up to 500 padding tokens is attended to. They are all equal (same input, no
        positions), so one of them with ln(count) added to its attention score gives the same result exactly.
        CLIP is causal, so what follows its end token never mattered.
        """
        device = self.transformer.device
        clip_ids = self.clip_tokenizer(
            prompts, padding=True, truncation=True, max_length=CLIP_MAX_LENGTH, return_tensors="pt"
        ).input_ids
        pooled = self.clip(clip_ids.to(device)).pooler_output
        # The training prompts are lower case; the rows of "Fox" and "FOX" are copies of "fox", made on export.
        rows = self.t5_tokenizer([prompt.lower() for prompt in prompts]).input_ids
        longest = max(len(row) for row in rows)
        t5_ids = torch.zeros(len(rows), longest + 1, dtype=torch.long)
        key_bias = torch.full((len(rows), longest + 1), -1e4)
        for index, row in enumerate(rows):
            t5_ids[index, : len(row)] = torch.tensor(row)
            key_bias[index, : len(row)] = 0.0
            key_bias[index, len(row)] = math.log(max(padded_length - len(row), 1))
        t5_ids, key_bias = t5_ids.to(device), key_bias.to(device)
        tokens = self.t5(t5_ids, attention_mask=key_bias[:, None, None, :]).last_hidden_state
        return EncodedText(tokens, pooled, key_bias)


@dataclass(frozen=True)
class EncodedText:
    """A batch of encoded prompts."""

    tokens: Tensor  # [B, L, 128], T5
    pooled: Tensor  # [B, 128], CLIP
    key_bias: Tensor  # [B, L], added to the attention score of each text token


def image_ids() -> Tensor:
    """FLUX's position ids of the packed latents: [64, 3] of (0, row, column)."""
    ids = torch.zeros(TOKENS_PER_SIDE, TOKENS_PER_SIDE, 3)
    ids[..., 1] += torch.arange(TOKENS_PER_SIDE)[:, None]
    ids[..., 2] += torch.arange(TOKENS_PER_SIDE)[None, :]
    return ids.reshape(-1, 3)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4C], FluxPipeline's order."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        max_position_embeddings=CLIP_MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(tokenizer: T5TokenizerFast) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        n_positions=T5_MAX_LENGTH,
    )
