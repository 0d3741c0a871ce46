"""Mochi 1."""

from diffusers import (
    AutoencoderKLMochi,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)

from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import t5_tokenizer


def mochi() -> PipelineAndRequest:
    transformer = diffusers_model(
        MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    vae = diffusers_model(
        AutoencoderKLMochi,
        seed=5,
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipeline = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 16,
        "width": 16,
        "num_frames": 7,
        "num_inference_steps": 4,
        "guidance_scale": 4.5,
        "max_sequence_length": 16,
    }
    return pipeline, request


MODELS = (TinyModel("mochi", mochi),)
