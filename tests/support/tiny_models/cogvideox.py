"""CogVideoX: text to video with two schedulers, image to video."""

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import t5_tokenizer

REQUEST = {
    "prompt": "a small cat",
    "negative_prompt": "bad",
    "height": 16,
    "width": 16,
    "num_frames": 8,
    "num_inference_steps": 3,
    "guidance_scale": 6.0,
    "max_sequence_length": 16,
}


def cogvideox() -> PipelineAndRequest:
    return CogVideoXPipeline(**_components(in_channels=4)), dict(REQUEST)


def cogvideox_dpm() -> PipelineAndRequest:
    """Each step reads the prediction of the step before, and guidance varies over the steps."""
    pipeline, request = cogvideox()
    scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return CogVideoXPipeline(**pipeline.components | {"scheduler": scheduler}), {
        **request,
        "use_dynamic_cfg": True,
    }


def cogvideox_i2v() -> PipelineAndRequest:
    components = _components(in_channels=8)  # latents and the first picture's latents
    return CogVideoXImageToVideoPipeline(**components), {**REQUEST, "image": noise_image(16), "num_frames": 9}


def _components(in_channels: int) -> dict[str, Any]:
    transformer = diffusers_model(
        CogVideoXTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
    )
    vae = diffusers_model(
        AutoencoderKLCogVideoX,
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(),
        "vae": vae,
        "transformer": transformer,
        "scheduler": CogVideoXDDIMScheduler(),
    }


MODELS = (
    TinyModel("cogvideox", cogvideox),
    TinyModel("cogvideox_dpm", cogvideox_dpm),
    TinyModel("cogvideox_i2v", cogvideox_i2v),
)
