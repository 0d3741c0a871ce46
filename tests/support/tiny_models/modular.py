"""Modular pipelines, made of the components of the other tiny models and saved with a modular_model_index.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModularPipeline

from tests.support.tiny_models.flux import flux, flux_img2img, flux_kontext
from tests.support.tiny_models.flux2 import flux2_dev, klein, klein_edit
from tests.support.tiny_models.hunyuan import hunyuanvideo15, hunyuanvideo15_i2v
from tests.support.tiny_models.ltx import ltx, ltx2, ltx2_i2v, ltx_i2v
from tests.support.tiny_models.qwen_image import (
    qwen_controlnet,
    qwen_edit_plus,
    qwen_img2img,
    qwen_inpaint,
    qwen_layered,
    qwenimage,
    qwenimage_edit,
)
from tests.support.tiny_models.stable_diffusion import sdxl, sdxl_controlnet, sdxl_img2img, sdxl_inpaint
from tests.support.tiny_models.stable_diffusion_3 import sd3, sd3_img2img
from tests.support.tiny_models.tiny_model import PipelineAndRequest, TinyModel
from tests.support.tiny_models.wan import helios, wan21, wan21_i2v, wan22, wan22_i2v
from tests.support.tiny_models.z_image import zimage, zimage_img2img

GUIDERS = {"guider": "", "guider_2": "_2"}  # the end of the names of their settings in a request
SETTINGS = ("guidance_scale", "enabled")


def modular(name: str, build: Callable[[], PipelineAndRequest], more: dict[str, Any]) -> PipelineAndRequest:
    """The modular pipeline of the class with the components of another, and of the other's request what it takes."""
    classic, request = build()
    pipeline = getattr(diffusers, f"{name}ModularPipeline")()
    parts = {part: each for part, each in classic.components.items() if part in pipeline.pretrained_component_names}
    configs = {key: value for key, value in classic.config.items() if key in pipeline._config_specs}
    pipeline.update_components(**parts, **configs)
    taken = {param.name for param in pipeline.blocks.inputs}
    taken |= {each + end for guider, end in GUIDERS.items() if hasattr(pipeline, guider) for each in SETTINGS}
    return pipeline, {key: value for key, value in request.items() if key in taken} | more


def load_modular(folder: Path, dtype: torch.dtype | None = None) -> Any:
    pipeline = ModularPipeline.from_pretrained(str(folder))
    pipeline.load_components(dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call_modular(pipeline: Any, arguments: dict[str, Any], generator: torch.Generator) -> list[Any]:
    """What the blocks make; the settings of guiders are set as a user of the library sets them."""
    inputs = {param.name for param in pipeline.blocks.inputs}
    plain = {name: value for name, value in arguments.items() if name in inputs}
    for guider, end in GUIDERS.items():
        names = [each for each in SETTINGS if each + end in arguments and each + end not in inputs]
        if names:
            changed = getattr(pipeline, guider).new(**{each: arguments[each + end] for each in names})
            pipeline.update_components(**{guider: changed})
    made = [param.name for param in pipeline.blocks.outputs if param.name in ("images", "videos", "audio")]
    # Blocks that lay the result over the given picture make pictures only.
    output_type = "pil" if "mask_image" in plain and hasattr(pipeline, "image_mask_processor") else "pt"
    output = pipeline(**plain, generator=generator, output_type=output_type, output=made)
    return torch.utils._pytree.tree_leaves(list(output.values()))


def tiny(name: str, pipeline: str, build: Callable[[], PipelineAndRequest], **more: Any) -> TinyModel:
    return TinyModel(f"modular_{name}", partial(modular, pipeline, build, more))


MODELS = (
    tiny("zimage", "ZImage", zimage, enabled=True),
    tiny("zimage_img2img", "ZImage", zimage_img2img, enabled=True),
    tiny("flux", "Flux", flux),
    tiny("flux_img2img", "Flux", flux_img2img),
    tiny("flux_kontext", "FluxKontext", flux_kontext),
    tiny("flux2", "Flux2", flux2_dev),
    tiny("klein", "Flux2Klein", klein),
    tiny("klein_edit", "Flux2Klein", klein_edit),
    tiny("klein_base", "Flux2KleinBase", klein),
    tiny("qwenimage", "QwenImage", qwenimage),
    tiny("qwen_img2img", "QwenImage", qwen_img2img),
    tiny("qwen_inpaint", "QwenImage", qwen_inpaint),
    tiny("qwen_controlnet", "QwenImage", qwen_controlnet),
    tiny("qwen_edit", "QwenImageEdit", qwenimage_edit),
    tiny("qwen_edit_plus", "QwenImageEditPlus", qwen_edit_plus),
    tiny("qwen_layered", "QwenImageLayered", qwen_layered),
    tiny("sd3", "StableDiffusion3", sd3),
    tiny("sd3_img2img", "StableDiffusion3", sd3_img2img),
    tiny("sdxl", "StableDiffusionXL", sdxl),
    tiny("sdxl_img2img", "StableDiffusionXL", sdxl_img2img),
    tiny("sdxl_inpaint", "StableDiffusionXL", sdxl_inpaint),
    tiny("sdxl_controlnet", "StableDiffusionXL", sdxl_controlnet),
    tiny("wan21", "Wan", wan21),
    tiny("wan22", "Wan22", wan22),
    tiny("wan21_i2v", "WanImage2Video", wan21_i2v),
    tiny("wan22_i2v", "Wan22Image2Video", wan22_i2v),
    tiny("helios", "Helios", helios),
    tiny("hunyuanvideo15", "HunyuanVideo15", hunyuanvideo15),
    tiny("hunyuanvideo15_i2v", "HunyuanVideo15", hunyuanvideo15_i2v),
    tiny("ltx", "LTX", ltx),
    tiny("ltx_i2v", "LTX", ltx_i2v),
    tiny("ltx2", "LTX2", ltx2),
    tiny("ltx2_i2v", "LTX2", ltx2_i2v),
)
