"""FLUX.1 and what is built on it: Kontext, Fill, ControlNet, Control, LoRA, Chroma."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from tests.support.tiny_models.autoencoders import FLUX_LATENTS, kl_autoencoder
from tests.support.tiny_models.pictures import center_mask, noise_image
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import clip_text_encoder, t5_encoder
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.tokenizers import clip_tokenizer, t5_tokenizer

# Latents have 4 channels; packing 2 x 2 of them makes 16 per token.
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
    "guidance_embeds": True,
}
LORA_FOLDER = "lora"


def flux() -> PipelineAndRequest:
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=diffusers_model(FluxTransformer2DModel, **TRANSFORMER),
        vae=kl_autoencoder(4, **FLUX_LATENTS),
    )
    request = {
        "prompt": "a small cat",
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "max_sequence_length": 32,
    }
    return pipeline, request


def flux_truecfg() -> PipelineAndRequest:
    pipeline, request = flux()
    return pipeline, {**request, "negative_prompt": "bad", "true_cfg_scale": 3.0}


def flux_kontext() -> PipelineAndRequest:
    pipeline, request = flux()
    request |= {"image": noise_image(32), "_auto_resize": False, "max_area": 16 * 16}
    return FluxKontextPipeline(**pipeline.components), request


def flux_img2img() -> PipelineAndRequest:
    pipeline, request = flux()
    return FluxImg2ImgPipeline(**pipeline.components), {**request, "image": noise_image(16), "strength": 0.8}


def flux_inpaint() -> PipelineAndRequest:
    pipeline, request = flux()
    request |= {
        "image": noise_image(16),
        "mask_image": center_mask(16),
        "strength": 0.8,
        "num_inference_steps": 6,
    }
    return FluxInpaintPipeline(**pipeline.components), request


def flux_fill() -> PipelineAndRequest:
    pipeline, request = flux()
    # Per token: 16 latents, 16 of the masked picture, and the mask's 4 x 4 pixels.
    transformer = diffusers_model(FluxTransformer2DModel, **{**TRANSFORMER, "in_channels": 48, "out_channels": 16})
    components = _without_image_prompt(pipeline) | {"transformer": transformer}
    return FluxFillPipeline(**components), {
        **request,
        "image": noise_image(16),
        "mask_image": center_mask(16),
    }


def flux_control() -> PipelineAndRequest:
    pipeline, request = flux()
    transformer = diffusers_model(FluxTransformer2DModel, **{**TRANSFORMER, "in_channels": 32, "out_channels": 16})
    components = _without_image_prompt(pipeline) | {"transformer": transformer}
    return FluxControlPipeline(**components), {**request, "control_image": noise_image(16)}


def flux_controlnet() -> PipelineAndRequest:
    pipeline, request = flux()
    controlnet = diffusers_model(
        FluxControlNetModel, seed=12, **{**TRANSFORMER, "num_layers": 1, "num_single_layers": 1}
    )
    request |= {"control_image": noise_image(16), "controlnet_conditioning_scale": 0.6}
    return FluxControlNetPipeline(**pipeline.components, controlnet=controlnet), request


def save_flux_lora(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Write a LoRA of the transformer and of CLIP, in diffusers' file format, beside the checkpoint."""
    adapted = FluxPipeline.from_pretrained(folder)
    targets = {"transformer": ["to_q", "to_k", "to_v"], "text_encoder": ["q_proj", "k_proj"]}
    layers: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        for name, target_modules in targets.items():
            model = adapted.components[name]
            model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=target_modules))
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
    FluxPipeline.save_lora_weights(folder / LORA_FOLDER, **layers)


def load_flux_lora(pipeline: DiffusionPipeline) -> None:
    """Load the adapter into the components that are real here."""
    lora = Path(pipeline.config["_name_or_path"]) / LORA_FOLDER
    weights, alphas = FluxPipeline.lora_state_dict(lora, return_alphas=True)
    if _is_real(pipeline.transformer):
        pipeline.load_lora_into_transformer(weights, alphas, pipeline.transformer, adapter_name="tiny")
    if _is_real(pipeline.text_encoder):
        pipeline.load_lora_into_text_encoder(
            weights, alphas, pipeline.text_encoder, prefix="text_encoder", adapter_name="tiny"
        )


def chroma() -> PipelineAndRequest:
    transformer = diffusers_model(
        ChromaTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_autoencoder(4, **FLUX_LATENTS),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    request = {
        "prompt": "a small cat",
        "negative_prompt": "bad",
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "max_sequence_length": 48,
    }
    return pipeline, request


def chroma_img2img() -> PipelineAndRequest:
    pipeline, request = chroma()
    request |= {"image": noise_image(16), "strength": 0.8, "num_inference_steps": 6}
    return ChromaImg2ImgPipeline(**_without_image_prompt(pipeline)), request


def _without_image_prompt(pipeline: DiffusionPipeline) -> dict[str, Any]:
    image_prompt = ("image_encoder", "feature_extractor")
    return {name: part for name, part in pipeline.components.items() if name not in image_prompt}


def _is_real(model: torch.nn.Module | None) -> bool:
    return model is not None and not any(parameter.is_meta for parameter in model.parameters())


MODELS = (
    TinyModel("flux", flux),
    TinyModel("flux_truecfg", flux_truecfg),
    TinyModel("flux_kontext", flux_kontext),
    TinyModel("flux_img2img", flux_img2img),
    TinyModel("flux_inpaint", flux_inpaint),
    TinyModel("flux_fill", flux_fill),
    TinyModel("flux_control", flux_control),
    TinyModel("flux_controlnet", flux_controlnet),
    TinyModel("flux_lora", flux, after_save=save_flux_lora, after_load=load_flux_lora),
    TinyModel("chroma", chroma),
    TinyModel("chroma_img2img", chroma_img2img),
)
