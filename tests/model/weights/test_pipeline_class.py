"""The pipeline that takes a checkpoint's components and the added ones is found, or asked for by name."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from deployments.errors import CheckpointError
from deployments.weights.parts.pipeline_class import pipeline_for

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' pipelines deprecate each other's code on import

OF_SD = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
OF_SDXL = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
OF_FLUX = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "scheduler")


def found(own: str, kept: tuple[str, ...], asked: str | None = None, **added: Any) -> str:
    return pipeline_for(own, added, kept, asked).__name__


@pytest.mark.parametrize(
    ("own", "kept", "added", "expected"),
    [
        ("StableDiffusionPipeline", OF_SD, "ControlNetModel", "StableDiffusionControlNetPipeline"),
        ("StableDiffusionImg2ImgPipeline", OF_SD, "ControlNetModel", "StableDiffusionControlNetImg2ImgPipeline"),
        ("StableDiffusionInpaintPipeline", OF_SD, "ControlNetModel", "StableDiffusionControlNetInpaintPipeline"),
        ("StableDiffusionXLPipeline", OF_SDXL, "ControlNetModel", "StableDiffusionXLControlNetPipeline"),
        ("StableDiffusionXLPipeline", OF_SDXL, "ControlNetUnionModel", "StableDiffusionXLControlNetUnionPipeline"),
        ("FluxPipeline", OF_FLUX, "FluxControlNetModel", "FluxControlNetPipeline"),
        ("AnimateDiffPipeline", (*OF_SD, "motion_adapter"), "ControlNetModel", "AnimateDiffControlNetPipeline"),
        ("SanaPipeline", OF_FLUX, "SanaControlNetModel", "SanaControlNetPipeline"),
        ("StableDiffusionControlNetPipeline", OF_SD, "ControlNetModel", "StableDiffusionControlNetPipeline"),
    ],
)
def test_a_controlnet_leads_to_the_pipeline_of_the_same_task_that_takes_it(
    own: str, kept: tuple[str, ...], added: str, expected: str
) -> None:
    assert found(own, kept, controlnet=getattr(diffusers, added)) == expected


def test_what_the_checkpoints_own_pipeline_takes_leaves_it() -> None:
    assert found("StableDiffusionPipeline", OF_SD, image_encoder=None) == "StableDiffusionPipeline"
    assert found("StableDiffusionPipeline", OF_SD, vae=diffusers.AutoencoderKL) == "StableDiffusionPipeline"
    assert found("StableDiffusionPipeline", OF_SD, scheduler=diffusers.DDIMScheduler) == "StableDiffusionPipeline"


def test_the_pipeline_that_was_asked_for_is_taken() -> None:
    asked = "StableDiffusionControlNetImg2ImgPipeline"
    assert found("StableDiffusionPipeline", OF_SD, asked, controlnet=diffusers.ControlNetModel) == asked
    assert found("StableDiffusionPipeline", OF_SD, "StableDiffusionImg2ImgPipeline") == "StableDiffusionImg2ImgPipeline"


@pytest.mark.parametrize(
    ("asked", "added", "sentence"),
    [
        (None, {"motion_adapter": diffusers.MotionAdapter}, "takes no motion_adapter: name a pipeline that does with"),
        (None, {"nonsense": None}, "takes no nonsense: name a pipeline"),
        (
            None,
            {"vae": diffusers.ControlNetModel},
            "components.vae: it is a ControlNetModel, and StableDiffusionPipeline takes AutoencoderKL",
        ),
        ("FluxControlNetPipeline", {}, "FluxControlNetPipeline needs .*controlnet.*: name it in `components:`"),
        ("StableDiffusionPipeline", {"controlnet": diffusers.ControlNetModel}, "components.controlnet: .* takes none"),
        (
            "StableDiffusionControlNetPipeline",
            {"controlnet": diffusers.FluxControlNetModel},
            "it is a FluxControlNetModel, and StableDiffusionControlNetPipeline takes ControlNetModel or",
        ),
        ("NoSuchPipeline", {}, "has no pipeline 'NoSuchPipeline'"),
        ("AutoencoderKL", {}, "has no pipeline 'AutoencoderKL'"),
    ],
)
def test_what_no_pipeline_takes_is_refused_with_what_to_name(
    asked: str | None, added: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        found("StableDiffusionPipeline", OF_SD, asked, **added)
