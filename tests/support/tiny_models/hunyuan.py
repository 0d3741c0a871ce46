"""Hunyuan: HunyuanVideo 1.0 and 1.5, image to video, FramePack, HunyuanImage."""

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance, ClassifierFreeGuidance
from transformers import (
    ByT5Tokenizer,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.support.tiny_models.autoencoders import hunyuan_video_15_autoencoder, hunyuan_video_autoencoder
from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import (
    clip_image_processor,
    clip_text_encoder,
    llama_encoder,
    qwen2_5_text_encoder,
    qwen2_5_vl,
    siglip_image_encoder,
    siglip_image_processor,
    t5_encoder,
)
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import clip_tokenizer, llama_tokenizer, qwen2_tokenizer

TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (2, 4, 4),
}
REQUEST = {
    "prompt": "a small cat",
    "prompt_template": {"template": "{}", "crop_start": 0},
    "height": 16,
    "width": 16,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 4.5,
    "max_sequence_length": 16,
}


def hunyuanvideo() -> PipelineAndRequest:
    transformer = diffusers_model(HunyuanVideoTransformer3DModel, **TRANSFORMER)
    return HunyuanVideoPipeline(**_video_components(), transformer=transformer), dict(REQUEST)


def hunyuanvideo_i2v() -> PipelineAndRequest:
    """The language model reads the picture too."""
    tokenizer = llama_tokenizer(("<image>", "<|start_header_id|>", "<|end_header_id|>"))
    # 4 channels of latents, 4 of the picture's latents, 1 of the mask.
    changes = {"in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"}
    pipeline = HunyuanVideoImageToVideoPipeline(
        **_video_components(tokenizer=tokenizer, text_encoder=_llava(tokenizer)),
        transformer=diffusers_model(HunyuanVideoTransformer3DModel, **{**TRANSFORMER, **changes}),
        image_processor=clip_image_processor(28),
    )
    picture_tokens = {"image_emb_len": 4, "image_emb_start": 1, "image_emb_end": 5}
    request = {
        **REQUEST,
        "image": noise_image(16),
        "prompt_template": {"template": "{}", "crop_start": 0, **picture_tokens},
        "num_inference_steps": 4,
        "max_sequence_length": 32,
    }
    return pipeline, request


def framepack() -> PipelineAndRequest:
    """Section after section; each is decoded inside the loop and feeds the next with its latents."""
    transformer = diffusers_model(
        HunyuanVideoFramepackTransformer3DModel,
        **{**TRANSFORMER, "num_layers": 1, "num_single_layers": 1, "patch_size": 2},
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    pipeline = HunyuanVideoFramepackPipeline(
        **_video_components(),
        transformer=transformer,
        image_encoder=siglip_image_encoder(),
        feature_extractor=siglip_image_processor(),
    )
    request = {
        **REQUEST,
        "image": noise_image(32),
        "height": 32,
        "width": 32,
        "num_frames": 21,
        "latent_window_size": 2,
        "num_inference_steps": 4,
        "max_sequence_length": 32,
    }
    return pipeline, request


def hunyuanvideo15() -> PipelineAndRequest:
    """Guidance is a component; quoted text is read by a second encoder."""
    pipeline = HunyuanVideo15Pipeline(**_video_15_components("t2v"))
    request = {
        "prompt": 'a cat "sun"',
        "negative_prompt": "bad",
        "height": 16,
        "width": 16,
        "num_frames": 9,
        "num_inference_steps": 4,
    }
    return pipeline, request


def hunyuanvideo15_i2v() -> PipelineAndRequest:
    pipeline = HunyuanVideo15ImageToVideoPipeline(
        **_video_15_components("i2v"),
        image_encoder=siglip_image_encoder(),
        feature_extractor=siglip_image_processor(),
    )
    request = {
        "image": noise_image(16),
        "prompt": "a cat",
        "negative_prompt": "bad",
        "num_frames": 9,
        "num_inference_steps": 4,
    }
    return pipeline, request


def hunyuan_image() -> PipelineAndRequest:
    """Guidance keeps a momentum from step to step."""
    tokenizer = qwen2_tokenizer()
    transformer = diffusers_model(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        guidance_embeds=False,
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers_model(
        AutoencoderKLHunyuanImage,
        seed=5,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        sample_size=128,
    )
    pipeline = HunyuanImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder=qwen2_5_vl(tokenizer),
        text_encoder_2=t5_encoder(),
        tokenizer=tokenizer,
        tokenizer_2=ByT5Tokenizer(),
        guider=_momentum_guidance(start_step=2),
        ocr_guider=_momentum_guidance(start_step=3),
    )
    request = {
        "prompt": 'a cat with "sun"',
        "negative_prompt": "bad",
        "height": 32,
        "width": 32,
        "num_inference_steps": 6,
    }
    return pipeline, request


def _video_components(**changes: Any) -> dict[str, Any]:
    components = {
        "text_encoder": llama_encoder(),
        "tokenizer": llama_tokenizer(),
        "text_encoder_2": clip_text_encoder(),
        "tokenizer_2": clip_tokenizer(),
        "vae": hunyuan_video_autoencoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    return {**components, **changes}


def _video_15_components(task_type: str) -> dict[str, Any]:
    transformer = diffusers_model(
        HunyuanVideo15Transformer3DModel,
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type=task_type,
    )
    return {
        "text_encoder": qwen2_5_text_encoder(),
        "tokenizer": qwen2_tokenizer(),
        "transformer": transformer,
        "vae": hunyuan_video_15_autoencoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=4.0),
    }


def _llava(tokenizer: LlamaTokenizerFast) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "vocab_size": len(tokenizer),
            "pad_token_id": 3,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 8,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        pad_token_id=3,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return transformers_model(LlavaForConditionalGeneration, config, seed=4)


def _momentum_guidance(start_step: int) -> AdaptiveProjectedMixGuidance:
    return AdaptiveProjectedMixGuidance(
        guidance_scale=3.5,
        adaptive_projected_guidance_start_step=start_step,
        adaptive_projected_guidance_momentum=-0.5,
    )


MODELS = (
    TinyModel("hunyuanvideo", hunyuanvideo),
    TinyModel("hunyuanvideo_i2v", hunyuanvideo_i2v),
    TinyModel("framepack", framepack),
    TinyModel("hunyuanvideo15", hunyuanvideo15),
    TinyModel("hunyuanvideo15_i2v", hunyuanvideo15_i2v),
    TinyModel("hunyuan_image", hunyuan_image),
)
