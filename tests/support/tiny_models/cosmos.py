"""Cosmos 1 (text to video) and Cosmos 2 (text to image)."""

import json
from pathlib import Path

from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2TextToImagePipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from tests.support.tiny_models.autoencoders import wan_autoencoder
from tests.support.tiny_models.patches import tiny_patches
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import t5_tokenizer

REQUEST = {
    "prompt": "a small cat",
    "negative_prompt": "bad",
    "height": 32,
    "width": 32,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "max_sequence_length": 16,
}


def cosmos() -> PipelineAndRequest:
    tiny_patches()
    vae = diffusers_model(
        AutoencoderKLCosmos,
        seed=5,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        patch_size=4,
        patch_type="haar",
        scaling_factor=1.0,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        rho=7.0,
        final_sigmas_type="sigma_min",
    )
    pipeline = CosmosTextToWorldPipeline(
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=_transformer(4),
        vae=vae,
        scheduler=scheduler,
    )
    return pipeline, {**REQUEST, "num_frames": 9}


def cosmos2_t2i() -> PipelineAndRequest:
    tiny_patches()
    pipeline = Cosmos2TextToImagePipeline(
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=_transformer(16),
        vae=wan_autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    )
    return pipeline, dict(REQUEST)


def forget_the_guardrail(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Published checkpoints do not list the safety checker: the pipeline makes it itself."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    del index["safety_checker"]
    path.write_text(json.dumps(index, indent=2))


def _transformer(channels: int) -> CosmosTransformer3DModel:
    return diffusers_model(
        CosmosTransformer3DModel,
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,  # published ones have it; resizing the mask needs torchvision
        extra_pos_embed_type="learnable",
    )


MODELS = (
    TinyModel("cosmos", cosmos, after_save=forget_the_guardrail),
    TinyModel("cosmos2_t2i", cosmos2_t2i, after_save=forget_the_guardrail),
)
