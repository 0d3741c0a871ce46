"""Tiny text, vision and language models of the classes that published checkpoints use as encoders."""

from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from tests.support.tiny_models.random_weights import transformers_model

QWEN_VOCABULARY = 500
LLAMA_VOCABULARY = GEMMA_VOCABULARY = 400


def clip_text_encoder() -> CLIPTextModel:
    """32 channels."""
    return transformers_model(CLIPTextModel, clip_text_config(), seed=1)


def clip_text_encoder_with_projection(seed: int = 11) -> CLIPTextModelWithProjection:
    """32 channels, pooled too."""
    return transformers_model(CLIPTextModelWithProjection, clip_text_config(), seed=seed)


def clip_text_config() -> CLIPTextConfig:
    """32 channels, 3 layers; the numbers of the special tokens are those of `clip_tokenizer`."""
    return CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=517,
        projection_dim=32,
        bos_token_id=515,
        eos_token_id=516,
        pad_token_id=516,
        hidden_act="gelu",
        max_position_embeddings=77,
    )


def t5_encoder(width: int = 32) -> T5EncoderModel:
    """`width` channels."""
    return transformers_model(T5EncoderModel, T5Config(**_t5_sizes(width)), seed=2)


def umt5_encoder() -> UMT5EncoderModel:
    """32 channels."""
    return transformers_model(UMT5EncoderModel, UMT5Config(**_t5_sizes(32)), seed=2)


def qwen3_config() -> Qwen3Config:
    """16 channels, 4 layers."""
    return Qwen3Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=QWEN_VOCABULARY,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )


def qwen3_encoder() -> Qwen3Model:
    """16 channels."""
    return transformers_model(Qwen3Model, qwen3_config(), seed=3)


def qwen3_language_model() -> Qwen3ForCausalLM:
    """16 channels in each of 4 layers."""
    return transformers_model(Qwen3ForCausalLM, qwen3_config(), seed=3)


def qwen2_5_vl(tokenizer: Qwen2Tokenizer, width: int = 16) -> Qwen2_5_VLForConditionalGeneration:
    """Reads text and pictures; `width` channels, 16 or 32."""
    config = Qwen2_5_VLConfig(
        text_config={"num_hidden_layers": 2, **qwen2_text_sizes(width)},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
        },
        **qwen2_vision_token_ids(tokenizer),
    )
    return transformers_model(Qwen2_5_VLForConditionalGeneration, config, seed=4)


def qwen2_5_text_encoder() -> Qwen2_5_VLTextModel:
    """Qwen2.5-VL's text half alone; 16 channels."""
    config = Qwen2_5_VLTextConfig(num_hidden_layers=3, **qwen2_text_sizes(16))
    return transformers_model(Qwen2_5_VLTextModel, config, seed=4)


def qwen2_vision_token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """The config fields that tell a Qwen2 vision-language model where pictures stand in the text."""
    tokens = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in tokens.items()}


def gemma2_encoder() -> Gemma2Model:
    """16 channels."""
    config = Gemma2Config(
        head_dim=8,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=GEMMA_VOCABULARY,
    )
    return transformers_model(Gemma2Model, config, seed=3)


def llama_config(num_hidden_layers: int = 3) -> LlamaConfig:
    """16 channels."""
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=num_hidden_layers,
        vocab_size=LLAMA_VOCABULARY,
        pad_token_id=3,
    )


def llama_encoder() -> LlamaModel:
    """16 channels."""
    return transformers_model(LlamaModel, llama_config(), seed=3)


def clip_image_encoder() -> CLIPVisionModel:
    """4 channels, reads 32 x 32 pixels."""
    config = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=4,
    )
    return transformers_model(CLIPVisionModel, config, seed=6)


def clip_image_encoder_with_projection(image_size: int, patch_size: int) -> CLIPVisionModelWithProjection:
    """32 channels, pooled; reads `image_size` x `image_size` pixels."""
    config = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        intermediate_size=37,
        patch_size=patch_size,
    )
    return transformers_model(CLIPVisionModelWithProjection, config, seed=6)


def clip_image_processor(size: int) -> CLIPImageProcessor:
    """Gives `size` x `size` pixels."""
    return CLIPImageProcessor(crop_size={"height": size, "width": size}, size={"shortest_edge": size})


def siglip_image_encoder() -> SiglipVisionModel:
    """16 channels, reads 28 x 28 pixels."""
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return transformers_model(SiglipVisionModel, config, seed=6)


def siglip_image_processor() -> SiglipImageProcessor:
    """Gives 28 x 28 pixels."""
    return SiglipImageProcessor(size={"height": 28, "width": 28})


def _t5_sizes(width: int) -> dict[str, object]:
    return {
        "d_model": width,
        "d_ff": 37,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 2,
        "vocab_size": 300,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
    }


def qwen2_text_sizes(width: int) -> dict[str, object]:
    head_dim = width // 2
    rope_parameters = {
        "mrope_section": [head_dim // 8, head_dim // 8, head_dim // 4],
        "rope_type": "default",
        "rope_theta": 1000000.0,
    }
    return {
        "hidden_size": width,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": QWEN_VOCABULARY,
        "rope_parameters": rope_parameters,
        "bos_token_id": None,
        "eos_token_id": None,
    }
