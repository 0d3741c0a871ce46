"""A stand-in with flash-attn's signature, layout and two checks, computed in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from deployments.accelerations.attention_kernels import refusal_of

Seen = list[tuple[torch.dtype, int]]  # dtype and numbers per head of each call


@contextmanager
def flash_attention_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What it has computed; what it refused is not among it."""
    seen: Seen = []

    def flash_attn_func(
        q: torch.Tensor,  # [B, S, H, D]
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> torch.Tensor:
        # csrc/flash_attn/flash_api.cpp of flash-attn 2.8
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if q.shape[-1] > 256:
            raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
        seen.append((q.dtype, q.shape[-1]))
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        is_grouped = q.shape[2] != k.shape[2]
        output = F.scaled_dot_product_attention(
            *heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=is_grouped
        )
        return output.transpose(1, 2)

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attn_func)
    refusal_of.cache_clear()
    try:
        yield seen
    finally:
        refusal_of.cache_clear()
