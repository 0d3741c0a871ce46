"""Stand-ins for the tests' models and processors that read pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.surroundings.hub import repository
from benchmarks.coverage.surroundings.tokenizers import (
    CHAT,
    gemma_tokenizer,
    qwen2_tokenizer,
)


def qwen_processor(folder: Path, tokenizer: Any) -> None:
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    images = Qwen2VLImageProcessorPil(size=size)
    videos = Qwen2VLVideoProcessor()
    Qwen2VLProcessor(images, tokenizer, videos, chat_template=CHAT).save_pretrained(folder)


@repository(
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration", "hf-internal-testing/tiny-random-Qwen2VL"
)
def _qwen2vl(folder: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = qwen2_tokenizer()
    qwen_processor(folder, tokenizer)
    torch.manual_seed(4)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 152064,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        vision_token_id=151654,
        image_token_id=151655,
        video_token_id=151656,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)


@repository("huangfeice/tiny-random-Qwen3VLForConditionalGeneration")
def _qwen3vl(folder: Path) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    qwen_processor(folder, qwen2_tokenizer())
    torch.manual_seed(4)
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 152064,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 14,
            "deepstack_visual_indexes": [0],
        },
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        image_token_id=151655,
        video_token_id=151656,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


@repository("hf-internal-testing/tiny-gemma3")
def _gemma3(folder: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(6)
    config = Gemma3Config(
        text_config={
            "model_type": "gemma3_text",
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 400,
            "max_position_embeddings": 512,
            "sliding_window": 64,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=7,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    gemma_tokenizer().save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-SiglipVisionModel")
def _siglip(folder: Path) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(6)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=2
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 30, "width": 30}).save_pretrained(folder)


@repository("hf-internal-testing/tiny-random-DPTForDepthEstimation")
def _dpt(folder: Path) -> None:
    from transformers import DPTImageProcessor

    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@repository("hf-internal-testing/Mistral-Small-3.1-24B-Instruct-2503-only-processor")
def _mistral(folder: Path) -> None:
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    tokenizer = qwen2_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    images = PixtralImageProcessorPil(size={"longest_edge": 28}, patch_size={"height": 6, "width": 6})
    PixtralProcessor(images, tokenizer, patch_size=6, spatial_merge_size=2, chat_template=CHAT).save_pretrained(folder)


@repository("zai-org/GLM-Image")
def _glm_image(folder: Path) -> None:
    from transformers import GlmImageImageProcessor, GlmImageProcessor

    tokenizer = qwen2_tokenizer()
    special = ["<|image|>", "<|dit_token_16384|>", "<|dit_token_16385|>", "<sop>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    named = {"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<|dit_token_16385|>"}
    tokenizer.save_pretrained(folder / "processor")
    tokenizer = type(tokenizer).from_pretrained(
        folder / "processor", extra_special_tokens=named, bos_token="<|endoftext|>"
    )
    images = GlmImageImageProcessor()
    GlmImageProcessor(images, tokenizer, chat_template=CHAT).save_pretrained(folder / "processor")
