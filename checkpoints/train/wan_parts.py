"""The parts of emoji-wan beside its VAE, how a batch of prompts is encoded in training, and a faster attention."""

import math
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from checkpoints.train.clip_latents import CELLS, LATENT_CHANNELS, LATENT_FRAMES
from checkpoints.train.clip_prompts import words
from checkpoints.train.tokenizers import t5_tokenizer

TEXT_WIDTH = 128
PATCH = 2  # latent cells; a token is 2x2 of them
TOKENS_PER_SIDE = CELLS // PATCH


def build_transformer() -> WanTransformer3DModel:
    """The untrained transformer; the model has two of them, for the noisy steps and for the rest."""
    transformer = WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=512,
        num_layers=5,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    start_well(transformer)
    return transformer


def start_well(transformer: WanTransformer3DModel) -> None:
    """Start from "the velocity is the noisy input", nearly right at high noise, with blocks that change little."""
    width = transformer.proj_out.in_features
    patch = transformer.patch_embedding
    with torch.no_grad():
        embed = torch.linalg.qr(torch.randn(width, patch.weight[0].numel()))[0]  # orthonormal columns
        patch.weight.copy_(embed.reshape(patch.weight.shape))
        patch.bias.zero_()
        # The embedding is [C, 1, 2, 2] per token, the output [1, 2, 2, C].
        order = torch.arange(embed.shape[1]).reshape(LATENT_CHANNELS, -1).T.flatten()
        # The last norm divides by the standard deviation of a token, sqrt(inputs / width) for unit noise.
        transformer.proj_out.weight.copy_(embed.T[order] * math.sqrt(embed.shape[1] / width))
        transformer.proj_out.bias.zero_()
        transformer.scale_shift_table.zero_()
        for block in transformer.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.3  # the gates
            block.attn2.to_out[0].weight.mul_(0.3)
            for layer in (block.attn1.to_q, block.attn1.to_k):
                nn.init.normal_(layer.bias, std=0.5)  # so that attention can tell places apart from the start
        time_proj = transformer.condition_embedder.time_proj
        time_proj.weight.zero_()
        time_proj.bias.zero_()


class WanParts(nn.Module):
    """The text encoder, its tokenizer and one transformer, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: T5TokenizerFast = t5_tokenizer(words())
        self.text_encoder = UMT5EncoderModel(_umt5_config(self.tokenizer))
        self.transformer = build_transformer()

    def forward(self, noisy: Tensor, sigma: Tensor, prompts: list[str], padded_length: int) -> Tensor:
        """The predicted velocity, [B, 16, 5, 8, 8] like `noisy`; sigma is [B], in (0, 1]."""
        text = self.encode(prompts, padded_length)
        processor = TrainingAttention(text.key_bias[:, None, None, :])
        for block in self.transformer.blocks:
            block.attn1.processor = block.attn2.processor = processor
        velocity: Tensor = self.transformer(
            hidden_states=noisy, timestep=1000.0 * sigma, encoder_hidden_states=text.tokens, return_dict=False
        )[0]
        return velocity

    def encode(self, prompts: list[str], padded_length: int) -> "EncodedText":
        """What WanPipeline computes for `prompts` padded to `padded_length` tokens, at the cost of the real tokens.

        Wan's transformer attends to the padding too, which is all zeros behind the text encoder. One such token with
        ln(count) added to its attention score gives the same result as all of them.
        """
        device = self.transformer.device
        # The training prompts are lower case; the rows of "Fox" and "FOX" are copies of "fox", made on export.
        given = self.tokenizer([prompt.lower() for prompt in prompts], padding=True, return_tensors="pt")
        mask = given.attention_mask.to(device)
        tokens = self.text_encoder(given.input_ids.to(device), attention_mask=mask).last_hidden_state
        tokens = functional.pad(tokens * mask[..., None], (0, 0, 0, 1))
        key_bias = torch.where(mask > 0, 0.0, -1e4)
        padding = (padded_length - mask.sum(1)).clamp(min=1).float().log()
        return EncodedText(tokens, torch.cat([key_bias, padding[:, None]], dim=1))


@dataclass(frozen=True)
class EncodedText:
    """A batch of encoded prompts."""

    tokens: Tensor  # [B, L, 128]; the last one stands for all padding
    key_bias: Tensor  # [B, L], added to the attention score of each text token


class TrainingAttention:
    """WanAttnProcessor's attention with a bias on the text tokens, and in float32, faster backwards on a CPU."""

    def __init__(self, text_bias: Tensor) -> None:
        self.text_bias = text_bias

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: None,
        rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """[B, N, width] -> [B, N, width]; self-attention where there is no `encoder_hidden_states`."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        with torch.autocast(hidden_states.device.type, enabled=False):
            query, key, value = (
                part.unflatten(2, (attn.heads, -1))
                for part in (attn.norm_q(query.float()), attn.norm_k(key.float()), value.float())
            )
            if rotary_emb is not None:
                query, key = _rotated(query, *rotary_emb), _rotated(key, *rotary_emb)
            attended = functional.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                attn_mask=None if encoder_hidden_states is None else self.text_bias,
            )
        output: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return output


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: each pair of neighbouring channels is a complex number, turned by its angle."""
    turn = torch.complex(cosine[..., 0::2].float(), sine[..., 1::2].float())
    return torch.view_as_real(torch.view_as_complex(heads.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def token_places() -> tuple[Tensor, Tensor, Tensor]:
    """Latent frame, row and column of each of the 80 tokens of a clip, in the transformer's order."""
    grid = torch.meshgrid(
        torch.arange(LATENT_FRAMES), torch.arange(TOKENS_PER_SIDE), torch.arange(TOKENS_PER_SIDE), indexing="ij"
    )
    frame, row, column = (axis.flatten() for axis in grid)
    return frame, row, column


def _umt5_config(tokenizer: T5TokenizerFast) -> UMT5Config:
    return UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
