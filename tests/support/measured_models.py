"""Measurements for plans without a walk: models of the audit's sizes, in bytes."""

from __future__ import annotations

from typing import Any

from deployments.messages import StageName
from deployments.plan.measured import Call, Component, Measured, Scheme

GB = 10**9


def component(name: str, gigabytes: float, *stages: StageName, **more: Any) -> Component:
    """In bfloat16, of linear layers alone, in 40 blocks."""
    loaded = round(gigabytes * GB)
    parts: dict[Scheme, float] = {
        "fp32": 2,
        "bf16": 1,
        "fp16": 1,
        **dict.fromkeys(("fp8", "fp8_dynamic", "int8", "int8_dynamic", "layerwise"), 0.5),
        **dict.fromkeys(("nf4", "gguf_q4"), 0.28),
        "gguf_q8": 0.53,
    }
    weights = {scheme: round(loaded * part) for scheme, part in parts.items()}
    block = loaded // 40
    return Component(name, name, stages, "bfloat16", loaded, weights, block // 8, block, 0, **more)


def autoencoder(gigabytes: float) -> Component:
    loaded = round(gigabytes * GB)
    return component(
        "vae", gigabytes, "encoder", "vae", halves={"encoder": loaded // 3, "decoder": loaded - loaded // 3}
    )


def calls(encoder: float, denoiser: float, vae: float, tiled: float | None = None) -> tuple[Call, ...]:
    in_tiles = None if tiled is None else round(tiled * GB)
    return (
        Call("text_encoder", "forward", "encoder", round(encoder * GB)),
        Call("transformer", "forward", "denoiser", round(denoiser * GB)),
        Call("vae", "decode", "vae", round(vae * GB), in_tiles),
    )


def flux(side: int = 1536, denoiser: float = 1.03, vae: float = 3.63) -> Measured:
    """FLUX.1-dev; at 1536 x 1536 as the audit counts it."""
    components = (
        component("transformer", 23.80, "denoiser"),
        component("text_encoder", 0.25, "encoder"),
        component("text_encoder_2", 9.52, "encoder"),
        autoencoder(0.17),
    )
    return Measured(
        "FLUX.1-dev",
        "FluxPipeline",
        {"width": str(side), "height": str(side)},
        side,
        side,
        1,
        components,
        calls(0.1, denoiser, vae, 0.4),
    )


def wan() -> Measured:
    """Wan2.2 A14B, 1280 x 720, 81 frames, its VAE in float32."""
    components = (
        component("transformer", 28.64, "denoiser"),
        component("transformer_2", 28.64, "denoiser"),
        component("text_encoder", 11.36, "encoder"),
        autoencoder(0.51),
    )
    return Measured(
        "Wan2.2",
        "WanPipeline",
        {"width": "1280", "height": "720", "num_frames": "81"},
        1280,
        720,
        81,
        components,
        calls(0.1, 8.62, 18.86, 1.2),
    )
