"""Stable Diffusion 3: text to image, image to image, inpainting, ControlNet."""

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from tests.support.tiny_models.autoencoders import SD3_LATENTS, kl_autoencoder
from tests.support.tiny_models.pictures import center_mask, noise_image
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import clip_text_encoder_with_projection, t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import clip_tokenizer, t5_tokenizer

TRANSFORMER = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
}


def sd3() -> PipelineAndRequest:
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_text_encoder_with_projection(seed=11),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder_with_projection(seed=12),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(64),
        tokenizer_3=t5_tokenizer(),
        transformer=diffusers_model(SD3Transformer2DModel, **TRANSFORMER, qk_norm="rms_norm"),
        vae=kl_autoencoder(4, **SD3_LATENTS),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "max_sequence_length": 32,
    }
    return pipeline, request


def sd3_img2img() -> PipelineAndRequest:
    pipeline, request = sd3()
    request |= {"image": noise_image(16), "strength": 0.8, "num_inference_steps": 6}
    return StableDiffusion3Img2ImgPipeline(**pipeline.components), request


def sd3_inpaint() -> PipelineAndRequest:
    pipeline, request = sd3()
    channels = {
        "in_channels": 16,
        "out_channels": 16,
    }  # the pipeline knows 16 (plain) and 33 (inpainting model)
    components = pipeline.components | {
        "transformer": diffusers_model(SD3Transformer2DModel, **{**TRANSFORMER, **channels}, qk_norm="rms_norm"),
        "vae": kl_autoencoder(16, **SD3_LATENTS),
    }
    request |= {
        "image": noise_image(16),
        "mask_image": center_mask(16),
        "strength": 0.8,
        "num_inference_steps": 6,
    }
    return StableDiffusion3InpaintPipeline(**components), request


def sd3_controlnet() -> PipelineAndRequest:
    pipeline, request = sd3()
    controlnet = diffusers_model(SD3ControlNetModel, seed=14, **{**TRANSFORMER, "num_layers": 1})
    request |= {"control_image": noise_image(16), "controlnet_conditioning_scale": 0.6}
    return StableDiffusion3ControlNetPipeline(**pipeline.components, controlnet=controlnet), request


MODELS = (
    TinyModel("sd3", sd3),
    TinyModel("sd3_img2img", sd3_img2img),
    TinyModel("sd3_inpaint", sd3_inpaint),
    TinyModel("sd3_controlnet", sd3_controlnet),
)
