"""FLUX.2: dev (guidance embedded), klein, editing, and klein with a key-value cache."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen2Tokenizer

from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.random_weights import diffusers_model, random_like, transformers_model
from tests.support.tiny_models.text_encoders import qwen3_language_model
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import qwen2_tokenizer


def klein() -> PipelineAndRequest:
    pipeline = Flux2KleinPipeline(
        scheduler=_scheduler(),
        text_encoder=qwen3_language_model(),
        tokenizer=qwen2_tokenizer(),
        transformer=_transformer(guidance_embeds=False),
        vae=_autoencoder(),
        is_distilled=False,
    )
    request = {
        "prompt": "a small cat",
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 64,
        "text_encoder_out_layers": (1, 2, 3),
    }
    return pipeline, request


def klein_edit() -> PipelineAndRequest:
    pipeline, request = klein()
    return pipeline, {**request, "image": noise_image(64)}


def klein_kv() -> PipelineAndRequest:
    """The first step returns a key-value cache that the later steps read."""
    pipeline, request = klein_edit()
    del request["guidance_scale"]
    return Flux2KleinKVPipeline(**pipeline.components, is_distilled=True), request


def flux2_dev() -> PipelineAndRequest:
    # Published ones have a PixtralProcessor here, which needs torchvision; only its text half is used.
    tokenizer = qwen2_tokenizer(extra_special_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    pipeline = Flux2Pipeline(
        scheduler=_scheduler(),
        text_encoder=_mistral3(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(guidance_embeds=True),
        vae=_autoencoder(),
    )
    _, request = klein()
    return pipeline, {**request, "max_sequence_length": 256}


def flux2_dev_edit() -> PipelineAndRequest:
    pipeline, request = flux2_dev()
    return pipeline, {**request, "image": [noise_image(64)]}


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def _transformer(*, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return diffusers_model(
        Flux2Transformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,  # three layers of a text encoder with 16 channels
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    )


def _autoencoder() -> AutoencoderKLFlux2:
    vae = diffusers_model(
        AutoencoderKLFlux2,
        seed=5,
        sample_size=32,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    with torch.no_grad():
        vae.bn.running_mean.copy_(random_like(vae.bn.running_mean, -0.3, 0.3, seed=0))
        vae.bn.running_var.copy_(random_like(vae.bn.running_var, 1.0, 2.0, seed=1))
    return vae


def _mistral3(tokenizer: Qwen2Tokenizer) -> Mistral3ForConditionalGeneration:
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 37,
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 4,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "image_size": 30,
            "patch_size": 6,
            "num_channels": 3,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
    )
    return transformers_model(Mistral3ForConditionalGeneration, config, seed=3)


MODELS = (
    TinyModel("klein", klein),
    TinyModel("klein_edit", klein_edit),
    TinyModel("klein_kv", klein_kv),
    TinyModel("flux2_dev", flux2_dev),
    TinyModel("flux2_dev_edit", flux2_dev_edit),
)
