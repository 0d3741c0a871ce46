"""HiDream: four text encoders and experts chosen per token."""

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
)
from transformers import LlamaForCausalLM

from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import clip_text_encoder_with_projection, llama_config, t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import clip_tokenizer, llama_tokenizer, t5_tokenizer


def hidream() -> PipelineAndRequest:
    transformer = diffusers_model(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    pipeline = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(4, (8, 8, 8, 16), scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_text_encoder_with_projection(seed=11),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder_with_projection(seed=12),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=transformers_model(LlamaForCausalLM, llama_config(2), seed=3),
        tokenizer_4=llama_tokenizer(),
        transformer=transformer,
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 64,
        "width": 64,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "max_sequence_length": 32,
    }
    return pipeline, request


def keep_the_requested_size(pipeline: DiffusionPipeline) -> None:
    """Without this the pipeline scales every size up to an area of about 1024^2."""
    pipeline.default_sample_size = 8


MODELS = (TinyModel("hidream", hidream, after_load=keep_the_requested_size),)
