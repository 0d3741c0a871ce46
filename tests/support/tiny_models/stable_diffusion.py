"""The UNet families: Stable Diffusion 1.5 and its relatives, SDXL, Stable Video Diffusion, AnimateDiff."""

from typing import Any

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.pictures import center_mask, noise_image
from tests.support.tiny_models.random_weights import diffusers_model, transformers_model
from tests.support.tiny_models.text_encoders import (
    clip_image_encoder_with_projection,
    clip_image_processor,
    clip_text_encoder,
    clip_text_encoder_with_projection,
)
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import clip_tokenizer

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SD15_UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "in_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
}
SDXL_UNET = {
    **SD15_UNET,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 80,
}
# What a UNet has besides its encoder half; a ControlNet has the encoder half only.
UNET_DECODER = {
    "sample_size": 32,
    "out_channels": 4,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
REQUEST = {
    "prompt": "a small cat",
    "negative_prompt": "bad",
    "guidance_scale": 5.0,
    "height": 32,
    "width": 32,
    "num_inference_steps": 6,
}


def sd15() -> PipelineAndRequest:
    return StableDiffusionPipeline(**_sd15_components()), dict(REQUEST)


def sd15_safety() -> PipelineAndRequest:
    """The safety checker is a transformers model that works after the VAE."""
    config = CLIPConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 100,
        },
        projection_dim=16,
    )
    components = _sd15_components(
        safety_checker=transformers_model(StableDiffusionSafetyChecker, config, seed=3),
        feature_extractor=clip_image_processor(32),
        requires_safety_checker=True,
    )
    return StableDiffusionPipeline(**components), dict(REQUEST)


def sd15_img2img() -> PipelineAndRequest:
    request = _without_size(REQUEST) | {"image": noise_image(32), "strength": 0.75}
    return StableDiffusionImg2ImgPipeline(**_sd15_components()), request


def sd15_inpaint() -> PipelineAndRequest:
    # Latents, the masked picture's latents, and the mask.
    unet = diffusers_model(UNet2DConditionModel, **{**SD15_UNET, **UNET_DECODER, "in_channels": 9})
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **NOISE_SCHEDULE)
    pipeline = StableDiffusionInpaintPipeline(**_sd15_components(unet=unet, scheduler=scheduler))
    return pipeline, {**REQUEST, "image": noise_image(32), "mask_image": center_mask(32)}


def sd15_controlnet() -> PipelineAndRequest:
    components = _sd15_components(
        controlnet=_controlnet(SD15_UNET), scheduler=UniPCMultistepScheduler(**NOISE_SCHEDULE)
    )
    request = {**REQUEST, "image": noise_image(32), "controlnet_conditioning_scale": 0.8}
    return StableDiffusionControlNetPipeline(**components), request


def sd15_lcm() -> PipelineAndRequest:
    """Latent consistency: guidance is embedded and every step draws new noise."""
    unet = diffusers_model(UNet2DConditionModel, **SD15_UNET, **UNET_DECODER, time_cond_proj_dim=32)
    components = _sd15_components(unet=unet, scheduler=LCMScheduler(**NOISE_SCHEDULE))
    request = {
        **REQUEST,
        "guidance_scale": 8.5,
        "num_inference_steps": 4,
        "original_inference_steps": 20,
    }
    del request["negative_prompt"]
    return LatentConsistencyModelPipeline(**components), request


def animatediff() -> PipelineAndRequest:
    """A motion adapter turns the image UNet into a video UNet when the pipeline is made."""
    adapter = diffusers_model(
        MotionAdapter,
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
    )
    components = _sd15_components(
        motion_adapter=adapter,
        scheduler=DDIMScheduler(clip_sample=False, **{**NOISE_SCHEDULE, "beta_schedule": "linear"}),
    )
    for absent in ("safety_checker", "requires_safety_checker"):
        del components[absent]
    return AnimateDiffPipeline(**components), {**REQUEST, "num_frames": 4, "num_inference_steps": 4}


def sdxl() -> PipelineAndRequest:
    pipeline = StableDiffusionXLPipeline(
        unet=diffusers_model(UNet2DConditionModel, **SDXL_UNET, **UNET_DECODER),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **NOISE_SCHEDULE),
        vae=kl_autoencoder(4, scaling_factor=0.13025),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder_with_projection(),
        tokenizer_2=clip_tokenizer(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return pipeline, {**REQUEST, "num_inference_steps": 4}


def sdxl_ancestral() -> PipelineAndRequest:
    """Every step draws new noise."""
    pipeline, request = sdxl()
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    return pipeline, request


def sdxl_img2img() -> PipelineAndRequest:
    pipeline, request = sdxl()
    request = _without_size(request) | {
        "num_inference_steps": 8,
        "image": noise_image(32),
        "strength": 0.75,
    }
    img2img = StableDiffusionXLImg2ImgPipeline(
        **pipeline.components, requires_aesthetics_score=False, add_watermarker=False
    )
    return img2img, request


def sdxl_inpaint() -> PipelineAndRequest:
    pipeline, request = sdxl()
    inpaint = StableDiffusionXLInpaintPipeline(
        **pipeline.components, requires_aesthetics_score=False, add_watermarker=False
    )
    request |= {
        "image": noise_image(32),
        "mask_image": center_mask(32),
        "strength": 0.8,
        "num_inference_steps": 6,
    }
    return inpaint, request


def sdxl_controlnet() -> PipelineAndRequest:
    pipeline, request = sdxl()
    controlled = StableDiffusionXLControlNetPipeline(
        **pipeline.components, controlnet=_controlnet(SDXL_UNET), add_watermarker=False
    )
    return controlled, {**request, "image": noise_image(32), "controlnet_conditioning_scale": 0.8}


def svd() -> PipelineAndRequest:
    """Image to video; the VAE decodes in chunks, so that one request makes several decoder calls."""
    unet = diffusers_model(
        UNetSpatioTemporalConditionModel,
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=32,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    vae = diffusers_model(
        AutoencoderKLTemporalDecoder,
        seed=5,
        block_out_channels=[32, 32],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        latent_channels=4,
    )
    scheduler = EulerDiscreteScheduler(
        **NOISE_SCHEDULE,
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipeline = StableVideoDiffusionPipeline(
        unet=unet,
        image_encoder=clip_image_encoder_with_projection(image_size=224, patch_size=56),
        scheduler=scheduler,
        vae=vae,
        feature_extractor=clip_image_processor(224),
    )
    request = {
        "image": noise_image(32),
        "height": 32,
        "width": 32,
        "num_frames": 4,
        "num_inference_steps": 4,
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 2.5,
        "decode_chunk_size": 2,
    }
    return pipeline, request


def _sd15_components(**changes: Any) -> dict[str, Any]:
    components = {
        "vae": kl_autoencoder(4, scaling_factor=0.18215),
        "text_encoder": clip_text_encoder(),
        "tokenizer": clip_tokenizer(),
        "unet": diffusers_model(UNet2DConditionModel, **SD15_UNET, **UNET_DECODER),
        "scheduler": PNDMScheduler(skip_prk_steps=True, **NOISE_SCHEDULE),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return {**components, **changes}


def _controlnet(unet: dict[str, Any]) -> ControlNetModel:
    return diffusers_model(ControlNetModel, seed=11, **unet, conditioning_embedding_out_channels=(8, 8))


def _without_size(request: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in request.items() if name not in ("height", "width")}


MODELS = (
    TinyModel("sd15", sd15),
    TinyModel("sd15_safety", sd15_safety),
    TinyModel("sd15_img2img", sd15_img2img),
    TinyModel("sd15_inpaint", sd15_inpaint),
    TinyModel("sd15_controlnet", sd15_controlnet),
    TinyModel("sd15_lcm", sd15_lcm),
    TinyModel("animatediff", animatediff),
    TinyModel("sdxl", sdxl),
    TinyModel("sdxl_ancestral", sdxl_ancestral),
    TinyModel("sdxl_img2img", sdxl_img2img),
    TinyModel("sdxl_inpaint", sdxl_inpaint),
    TinyModel("sdxl_controlnet", sdxl_controlnet),
    TinyModel("svd", svd),
)
