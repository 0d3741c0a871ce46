"""Qwen-Image: text to image, image to image, inpainting, ControlNet, editing, layers."""

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from tests.support.tiny_models.autoencoders import qwen_autoencoder
from tests.support.tiny_models.pictures import center_mask, noise_image
from tests.support.tiny_models.processors import qwen2_processor
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import qwen2_5_vl
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import qwen2_tokenizer

# Latents have 4 channels; packing 2 x 2 of them makes 16 per token.
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}


def qwenimage() -> PipelineAndRequest:
    tokenizer = qwen2_tokenizer()
    pipeline = QwenImagePipeline(
        scheduler=_scheduler(),
        text_encoder=qwen2_5_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers_model(QwenImageTransformer2DModel, **TRANSFORMER),
        vae=qwen_autoencoder(4),
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "true_cfg_scale": 4.0,
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "max_sequence_length": 64,
    }
    return pipeline, request


def qwen_img2img() -> PipelineAndRequest:
    pipeline, request = qwenimage()
    request |= {"image": noise_image(16), "strength": 0.8, "num_inference_steps": 6}
    return QwenImageImg2ImgPipeline(**pipeline.components), request


def qwen_inpaint() -> PipelineAndRequest:
    pipeline, request = qwenimage()
    request |= {
        "image": noise_image(16),
        "mask_image": center_mask(16),
        "strength": 0.8,
        "num_inference_steps": 6,
    }
    return QwenImageInpaintPipeline(**pipeline.components), request


def qwen_controlnet() -> PipelineAndRequest:
    pipeline, request = qwenimage()
    controlnet = diffusers_model(QwenImageControlNetModel, seed=13, **TRANSFORMER)
    request |= {"control_image": noise_image(16), "controlnet_conditioning_scale": 0.5}
    return QwenImageControlNetPipeline(**pipeline.components, controlnet=controlnet), request


def qwenimage_edit() -> PipelineAndRequest:
    pipeline, request = qwenimage()
    processor = qwen2_processor(pipeline.tokenizer)
    request |= {"prompt": "make the sky blue", "image": noise_image(32)}
    return QwenImageEditPipeline(**pipeline.components, processor=processor), request


def qwen_edit_plus() -> PipelineAndRequest:
    """Several input pictures."""
    pipeline, request = qwenimage_edit()
    request |= {"image": [noise_image(32, seed=0), noise_image(32, seed=1)]}
    return QwenImageEditPlusPipeline(**pipeline.components), request


def qwen_layered() -> PipelineAndRequest:
    """Separates a picture into transparent layers."""
    pipeline, request = qwenimage()
    channels = {"in_channels": 32, "out_channels": 8}
    transformer = diffusers_model(
        QwenImageTransformer2DModel,
        **{**TRANSFORMER, **channels},
        use_additional_t_cond=True,
        use_layer3d_rope=True,
    )
    components = pipeline.components | {
        "transformer": transformer,
        "vae": qwen_autoencoder(8, input_channels=4),
        "processor": qwen2_processor(pipeline.tokenizer),
    }
    for size in ("height", "width"):
        del request[size]
    request |= {"image": noise_image(32).convert("RGBA"), "layers": 2, "true_cfg_scale": 3.0}
    return QwenImageLayeredPipeline(**components), request


def qwen_layered_caption() -> PipelineAndRequest:
    """Without a prompt the text encoder generates a caption of the picture."""
    pipeline, request = qwen_layered()
    return pipeline, {**request, "prompt": ""}


def sample_the_caption(pipeline: DiffusionPipeline) -> None:
    """Make the text encoder draw its caption from the global random generator."""
    pipeline.text_encoder.generation_config.update(do_sample=True, temperature=1.0, top_k=20, max_new_tokens=20)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)


MODELS = (
    TinyModel("qwenimage", qwenimage),
    TinyModel("qwen_img2img", qwen_img2img),
    TinyModel("qwen_inpaint", qwen_inpaint),
    TinyModel("qwen_controlnet", qwen_controlnet),
    TinyModel("qwenimage_edit", qwenimage_edit),
    TinyModel("qwen_edit_plus", qwen_edit_plus),
    TinyModel("qwen_layered", qwen_layered),
    TinyModel("qwen_layered_caption", qwen_layered_caption),
    TinyModel("qwen_layered_sample", qwen_layered_caption, after_load=sample_the_caption),
)
