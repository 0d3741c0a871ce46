"""EasyAnimate: a vision-language model as the text encoder, the MAGVIT autoencoder."""

from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import qwen2_text_sizes, qwen2_vision_token_ids
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import qwen2_tokenizer


def easyanimate() -> PipelineAndRequest:
    tokenizer = qwen2_tokenizer()
    text_config = Qwen2VLConfig(
        text_config={"num_hidden_layers": 2, **qwen2_text_sizes(16)},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        **qwen2_vision_token_ids(tokenizer),
    )
    transformer = diffusers_model(
        EasyAnimateTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
    )
    vae = diffusers_model(
        AutoencoderKLMagvit,
        seed=5,
        in_channels=3,
        out_channels=3,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    pipeline = EasyAnimatePipeline(
        vae=vae,
        text_encoder=transformers_model(Qwen2VLForConditionalGeneration, text_config, seed=4),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": 4,
        "guidance_scale": 6.0,
    }
    return pipeline, request


MODELS = (TinyModel("easyanimate", easyanimate),)
