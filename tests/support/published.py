"""Published checkpoints without their weights: what their configuration files say, written out as folders.

Where a configuration of diffusers has its class's defaults it is written as the class alone. The tokenizers are tiny
ones of the same kind, because what is planned needs the number of their pieces, not the words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.tiny_models.processors import qwen2_processor
from tests.support.tiny_models.tokenizers import clip_tokenizer, gemma_tokenizer, qwen2_tokenizer, t5_tokenizer

Config = tuple[str, str, dict[str, Any]]  # the library in model_index.json, the class, its settings


@dataclass(frozen=True)
class Published:
    """A pipeline: its class, the settings of its models and scheduler, what else it is made with."""

    pipeline: str
    components: Mapping[str, Config]
    tokenizers: Mapping[str, Callable[[], Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_published(name: str, root: Path) -> Path:
    """The folder of the checkpoint, which has no weights."""
    published, folder = PUBLISHED[name], root / name
    index: dict[str, Any] = {"_class_name": published.pipeline, **published.settings}
    for component, (library, cls, settings) in published.components.items():
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        own = {"architectures": [cls]} if library == "transformers" else {"_class_name": cls}
        (folder / component).mkdir(parents=True)
        (folder / component / file).write_text(json.dumps(own | settings), encoding="utf-8")
        index[component] = [library, cls]
    for component, make in published.tokenizers.items():
        tokenizer = make()
        tokenizer.save_pretrained(folder / component)
        module = type(tokenizer).__module__
        index[component] = [module.partition(".")[0] if "transformers" in module else module, type(tokenizer).__name__]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def flow_matching(**settings: Any) -> Config:
    return "diffusers", "FlowMatchEulerDiscreteScheduler", settings


def diffusers(cls: str, **settings: Any) -> Config:
    return "diffusers", cls, settings


CLIP_L: Config = (
    "transformers",
    "CLIPTextModel",
    {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "max_position_embeddings": 77,
    },
)


def t5_xxl(cls: str, model_type: str, vocab_size: int) -> Config:
    shape = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64, "vocab_size": vocab_size}
    kind = {"model_type": model_type, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return "transformers", cls, shape | kind


QWEN3_4B: Config = (
    "transformers",
    "Qwen3Model",
    {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
)
QWEN2_5_VL_7B: Config = (
    "transformers",
    "Qwen2_5_VLForConditionalGeneration",
    {
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
    },
)
MISTRAL_24B: Config = (
    "transformers",
    "Mistral3ForConditionalGeneration",
    {
        "model_type": "mistral3",
        "tie_word_embeddings": False,
        "image_token_index": 10,
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
            "max_position_embeddings": 131072,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
        },
    },
)
GEMMA3_12B: Config = (
    "transformers",
    "Gemma3ForConditionalGeneration",
    {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "vocab_size": 262208,
            "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
        },
    },
)

FLUX_VAE = diffusers(
    "AutoencoderKL",
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=16,
    sample_size=1024,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
UMT5_XXL = t5_xxl("UMT5EncoderModel", "umt5", 256384)
QWEN_IMAGE = {
    "transformer": diffusers("QwenImageTransformer2DModel"),
    "text_encoder": QWEN2_5_VL_7B,
    "vae": diffusers("AutoencoderKLQwenImage"),
    "scheduler": flow_matching(use_dynamic_shifting=True, shift_terminal=0.02),
}


def mistral_tokenizer() -> Any:
    """In place of a processor that needs torchvision; only its half for texts is used."""
    return qwen2_tokenizer(extra_special_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"))


PUBLISHED = {
    "FLUX.1-dev": Published(
        "FluxPipeline",
        {
            "transformer": diffusers("FluxTransformer2DModel", guidance_embeds=True),
            "text_encoder": CLIP_L,
            "text_encoder_2": t5_xxl("T5EncoderModel", "t5", 32128),
            "vae": FLUX_VAE,
            "scheduler": flow_matching(shift=3.0, use_dynamic_shifting=True),
        },
        {"tokenizer": clip_tokenizer, "tokenizer_2": t5_tokenizer},
    ),
    "FLUX.2-dev": Published(
        "Flux2Pipeline",
        {
            "transformer": diffusers("Flux2Transformer2DModel"),
            "text_encoder": MISTRAL_24B,
            "vae": diffusers("AutoencoderKLFlux2"),
            "scheduler": flow_matching(shift=3.0, use_dynamic_shifting=True),
        },
        {"tokenizer": mistral_tokenizer},
    ),
    "Qwen-Image": Published("QwenImagePipeline", QWEN_IMAGE, {"tokenizer": qwen2_tokenizer}),
    "Qwen-Image-Edit": Published(
        "QwenImageEditPipeline",
        QWEN_IMAGE,
        {"tokenizer": qwen2_tokenizer, "processor": lambda: qwen2_processor(qwen2_tokenizer())},
    ),
    "Z-Image-Turbo": Published(
        "ZImagePipeline",
        {
            "transformer": diffusers("ZImageTransformer2DModel"),
            "text_encoder": QWEN3_4B,
            "vae": FLUX_VAE,
            "scheduler": flow_matching(shift=3.0),
        },
        {"tokenizer": qwen2_tokenizer},
    ),
    "Wan2.2-T2V-A14B": Published(
        "WanPipeline",
        {
            "transformer": diffusers("WanTransformer3DModel"),
            "transformer_2": diffusers("WanTransformer3DModel"),
            "text_encoder": UMT5_XXL,
            "vae": diffusers("AutoencoderKLWan"),
            "scheduler": ("diffusers", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        },
        {"tokenizer": t5_tokenizer},
        {"boundary_ratio": 0.875},
    ),
    "Wan2.2-TI2V-5B": Published(
        "WanPipeline",
        {
            "transformer": diffusers(
                "WanTransformer3DModel",
                in_channels=48,
                out_channels=48,
                num_attention_heads=24,
                ffn_dim=14336,
                num_layers=30,
            ),
            "text_encoder": UMT5_XXL,
            "vae": diffusers(
                "AutoencoderKLWan",
                base_dim=160,
                decoder_base_dim=256,
                z_dim=48,
                is_residual=True,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                scale_factor_spatial=16,
                latents_mean=[0.0] * 48,
                latents_std=[1.0] * 48,
            ),
            "scheduler": ("diffusers", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0}),
        },
        {"tokenizer": t5_tokenizer},
        {"expand_timesteps": True},
    ),
    "LTX-2": Published(
        "LTX2Pipeline",
        {
            "transformer": diffusers("LTX2VideoTransformer3DModel", rope_type="split"),
            "text_encoder": GEMMA3_12B,
            "connectors": ("ltx2", "LTX2TextConnectors", {"rope_type": "split"}),
            "vae": diffusers(
                "AutoencoderKLLTX2Video",
                decoder_causal=False,
                spatial_compression_ratio=32,
                temporal_compression_ratio=8,
            ),
            "audio_vae": diffusers("AutoencoderKLLTX2Audio"),
            "vocoder": ("ltx2", "LTX2Vocoder", {}),
            "scheduler": flow_matching(use_dynamic_shifting=True, shift_terminal=0.1),
        },
        {"tokenizer": lambda: gemma_tokenizer(1024)},
    ),
}
