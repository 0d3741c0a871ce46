"""What each pipeline of diffusers can do, and where that differs from what its class's name suggested."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from deployments.errors import CheckpointError
from deployments.messages import MediaKind, StageDescription, Task
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.outputs import media_kind, output_type, own_arguments
from deployments.stage_pipeline.tasks import ENLARGES_LATENTS, NEEDS_INPUT, tasks_of
from tests.support.source import syntax_tree

# Importing every pipeline brings what its libraries deprecate in each other's code.
pytestmark = pytest.mark.filterwarnings("default")

TINY_MODELS = Path(__file__).parents[3] / "support" / "tiny_models"

# Of the pipelines that have a tiny model.
TASKS: dict[str, tuple[Task, ...]] = {
    "AnimateDiffPipeline": ("text_to_video",),
    "AuraFlowPipeline": ("text_to_image",),
    "BriaFiboPipeline": ("text_to_image",),
    "ChromaImg2ImgPipeline": ("image_to_image",),
    "ChromaPipeline": ("text_to_image",),
    "CogVideoXImageToVideoPipeline": ("image_to_video",),
    "CogVideoXPipeline": ("text_to_video",),
    "CogView4Pipeline": ("text_to_image",),
    "Cosmos2TextToImagePipeline": ("text_to_image",),
    "CosmosTextToWorldPipeline": ("text_to_video",),
    "EasyAnimatePipeline": ("text_to_video",),
    "Flux2KleinKVPipeline": ("text_to_image", "image_to_image"),
    "Flux2KleinPipeline": ("text_to_image", "image_to_image"),
    "Flux2Pipeline": ("text_to_image", "image_to_image"),
    "FluxControlNetPipeline": ("text_to_image",),
    "FluxControlPipeline": ("text_to_image",),
    "FluxFillPipeline": ("inpainting",),
    "FluxImg2ImgPipeline": ("image_to_image",),
    "FluxInpaintPipeline": ("inpainting",),
    "FluxKontextPipeline": ("text_to_image", "image_to_image"),
    "FluxPipeline": ("text_to_image",),
    "HeliosPipeline": ("text_to_video", "image_to_video", "video_to_video"),
    "HiDreamImagePipeline": ("text_to_image",),
    "HunyuanImagePipeline": ("text_to_image",),
    "HunyuanVideo15ImageToVideoPipeline": ("image_to_video",),
    "HunyuanVideo15Pipeline": ("text_to_video",),
    "HunyuanVideoFramepackPipeline": ("image_to_video",),
    "HunyuanVideoImageToVideoPipeline": ("image_to_video",),
    "HunyuanVideoPipeline": ("text_to_video",),
    "Kandinsky5T2IPipeline": ("text_to_image",),
    "KandinskyV22CombinedPipeline": ("text_to_image",),
    "LTX2ImageToVideoPipeline": ("image_to_video",),
    "LTX2Pipeline": ("text_to_video",),
    "LTXConditionPipeline": ("text_to_video", "image_to_video", "video_to_video"),
    "LTXImageToVideoPipeline": ("image_to_video",),
    "LTXPipeline": ("text_to_video",),
    "LTXLatentUpsamplePipeline": (),
    "LatentConsistencyModelPipeline": ("text_to_image",),
    "Lumina2Pipeline": ("text_to_image",),
    "MochiPipeline": ("text_to_video",),
    "PRXPipeline": ("text_to_image",),
    "PRXPixelPipeline": ("text_to_image",),
    "PixArtAlphaPipeline": ("text_to_image",),
    "PixArtSigmaPAGPipeline": ("text_to_image",),
    "PixArtSigmaPipeline": ("text_to_image",),
    "QwenImageControlNetPipeline": ("text_to_image",),
    "QwenImageEditPipeline": ("image_to_image",),
    "QwenImageEditPlusPipeline": ("image_to_image",),
    "QwenImageImg2ImgPipeline": ("image_to_image",),
    "QwenImageInpaintPipeline": ("inpainting",),
    "QwenImageLayeredPipeline": ("text_to_image", "image_to_image"),
    "QwenImagePipeline": ("text_to_image",),
    "SanaPipeline": ("text_to_image",),
    "SanaSprintPipeline": ("text_to_image",),
    "SanaVideoPipeline": ("text_to_video",),
    "SkyReelsV2DiffusionForcingPipeline": ("text_to_video",),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": ("video_to_video",),
    "SkyReelsV2Pipeline": ("text_to_video",),
    "StableAudioPipeline": ("text_to_audio", "audio_to_audio"),
    "StableCascadeCombinedPipeline": ("text_to_image",),
    "StableDiffusion3ControlNetPipeline": ("text_to_image",),
    "StableDiffusion3Img2ImgPipeline": ("image_to_image",),
    "StableDiffusion3InpaintPipeline": ("inpainting",),
    "StableDiffusion3Pipeline": ("text_to_image",),
    "StableDiffusionAttendAndExcitePipeline": ("text_to_image",),
    "StableDiffusionControlNetPipeline": ("image_to_image",),
    "StableDiffusionImg2ImgPipeline": ("image_to_image",),
    "StableDiffusionInpaintPipeline": ("inpainting",),
    "StableDiffusionPAGPipeline": ("text_to_image",),
    "StableDiffusionPipeline": ("text_to_image",),
    "StableDiffusionSAGPipeline": ("text_to_image",),
    "StableDiffusionXLControlNetPipeline": ("image_to_image",),
    "StableDiffusionXLImg2ImgPipeline": ("image_to_image",),
    "StableDiffusionXLInpaintPipeline": ("inpainting",),
    "StableDiffusionXLPipeline": ("text_to_image",),
    "StableVideoDiffusionPipeline": ("image_to_video",),
    "TextToVideoZeroSDXLPipeline": ("text_to_image",),
    "WanAnimatePipeline": ("image_to_video",),
    "WanImageToVideoPipeline": ("image_to_video",),
    "WanPipeline": ("text_to_video",),
    "WanVACEPipeline": ("text_to_video", "video_to_video"),
    "WanVideoToVideoPipeline": ("video_to_video",),
    "ZImageImg2ImgPipeline": ("image_to_image",),
    "ZImagePipeline": ("text_to_image",),
}


@cache
def servable() -> dict[str, tuple[Any, MediaKind]]:
    """Every pipeline class that diffusers exports and that can be served, with what it makes."""
    found: dict[str, tuple[Any, MediaKind]] = {}
    for name in dir(diffusers):
        value = getattr(diffusers, name)
        if isinstance(value, type) and issubclass(value, DiffusionPipeline) and value is not DiffusionPipeline:
            try:
                found[name] = value, media_kind(value)
            except CheckpointError:
                continue
    return found


def description(name: str) -> StageDescription:
    pipeline_class, kind = servable()[name]
    parameters, required = call_parameters(pipeline_class)
    return StageDescription(
        stages=("encoder",),
        pipeline_class=name,
        parameters=parameters,
        required=required,
        media_kind=kind,
        size_multiple=16,
        default_width=None,
        default_height=None,
        device="cpu",
        dtype="float32",
        weight_bytes={},
        process_id=1,
        tasks=tasks_of(pipeline_class, kind),
    )


@pytest.mark.parametrize("name", TASKS)
def test_the_pipelines_of_the_tiny_models_have_these_tasks(name: str) -> None:
    assert description(name).tasks == TASKS[name]


def test_every_tiny_model_is_in_the_table() -> None:
    built = {
        node.id
        for file in TINY_MODELS.glob("*.py")
        for node in ast.walk(syntax_tree(file))
        if isinstance(node, ast.Name) and node.id in servable()
    }
    assert built == TASKS.keys()


# The rules by which the names of classes were read before there was data.

STARTS_FROM_A_PICTURE = re.compile(r"Img2Img|Inpaint|Edit|Pix2Pix|Upscale|Image2Image|Variation|ControlNet")
TAKES_TENSORS = re.compile(r"EasyAnimate|AnyFlow|LatentUpsample")


def needed_a_picture(described: StageDescription) -> bool:
    return "image" in described.required or (
        "image" in described.parameters and bool(STARTS_FROM_A_PICTURE.search(described.pipeline_class))
    )


# Each cannot do without a picture, but its name did not say it, so a request without one failed in the pipeline.
NEEDS_A_PICTURE_TOO = {
    "CycleDiffusionPipeline": "its __call__ preprocesses `image` unconditionally",
    "FluxFillPipeline": "without image and mask its transformer's input has too few channels",
    "I2VGenXLPipeline": "check_inputs refuses None",
    "IFSuperResolutionPipeline": "check_inputs refuses None",
    "LDMSuperResolutionPipeline": "raises ValueError for None",
    "LTX2ImageToVideoPipeline": "its __call__ preprocesses `image` unless latents are given, which callers cannot",
    "LTXImageToVideoPipeline": "its __call__ preprocesses `image` unless latents are given, which callers cannot",
    "StableDiffusionAdapterPipeline": "`image` is the adapter's condition",
    "StableDiffusionDepth2ImgPipeline": "check_inputs and the depth estimator need it",
    "StableDiffusionXLAdapterPipeline": "`image` is the adapter's condition",
    "VisualClozeGenerationPipeline": "the pictures are the examples that it goes by",
    "VisualClozePipeline": "the pictures are the examples that it goes by",
}


def test_the_pipelines_that_begin_with_a_picture_are_those_of_before_and_the_listed_ones() -> None:
    described = [description(name) for name in servable()]
    before = {each.pipeline_class for each in described if needed_a_picture(each)}
    now = {each.pipeline_class for each in described if each.needs_picture}
    assert len(before) > 60
    assert now - before == NEEDS_A_PICTURE_TOO.keys()
    assert before - now == set()


def test_the_pipelines_that_edit_and_extend_videos_are_those_of_before() -> None:
    for name in servable():
        described = description(name)
        edits = "video" in described.parameters and not TAKES_TENSORS.search(name)
        extends = described.media_kind == "video" and "image" in described.parameters
        assert ("video_to_video" in described.tasks) == edits, name
        assert ("image_to_video" in described.tasks) == extends, name


def test_the_tasks_of_a_pipeline_are_of_what_it_makes() -> None:
    ends: dict[str, str | tuple[str, ...]] = {
        "image": ("_image", "inpainting"),
        "video": "_video",
        "audio": "_audio",
        "tensors": "feature_extraction",
    }
    for name in servable():
        described = description(name)
        assert all(task.endswith(ends[described.media_kind]) for task in described.tasks), name
        assert len(described.tasks) == len(set(described.tasks))


def test_sound_and_tensors_are_told_by_the_output_and_text_is_refused() -> None:
    kinds = {name: kind for name, (_, kind) in servable().items()}
    assert {name for name, kind in kinds.items() if kind == "audio"} >= {
        "AceStepPipeline", "AudioLDM2Pipeline", "DanceDiffusionPipeline", "MusicLDMPipeline", "StableAudioPipeline",
    }  # fmt: skip
    assert {name for name, kind in kinds.items() if kind == "tensors"} >= {
        "FluxPriorReduxPipeline", "KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "StableCascadePriorPipeline",
    }  # fmt: skip
    assert {kinds[f"Marigold{each}Pipeline"] for each in ("Depth", "Normals", "Intrinsics")} == {"image"}
    assert {"LLaDA2Pipeline", "DiffusionGemmaPipeline"}.isdisjoint(kinds)


def test_a_pipeline_is_asked_for_the_first_form_that_it_does_not_refuse() -> None:
    assert output_type(servable()["ShapEPipeline"][0]) == "np"
    assert output_type(servable()["FluxPipeline"][0]) == "pt"
    generator = torch.Generator()
    assert own_arguments(servable()["DanceDiffusionPipeline"][0], generator) == {"generator": generator}
    assert own_arguments(servable()["FluxPriorReduxPipeline"][0], generator) == {}


def test_every_pipeline_of_sound_has_an_argument_for_the_length() -> None:
    named = {name: description(name).length_argument for name, (_, kind) in servable().items() if kind == "audio"}
    assert {name for name, argument in named.items() if argument is None} == set()
    assert named["StableAudioPipeline"] == "audio_end_in_s"


def test_a_pipeline_takes_the_parameters_of_its_call_with_and_without_defaults() -> None:
    described = description("WanImageToVideoPipeline")
    assert described.takes("image")
    assert described.takes("num_frames")
    assert not described.takes("video")
    for name in servable():
        parameters, required = call_parameters(servable()[name][0])
        assert set(required) <= parameters.keys(), name


def test_every_exception_is_of_a_pipeline_that_diffusers_has() -> None:
    assert NEEDS_INPUT.keys() | ENLARGES_LATENTS <= servable().keys()


def test_every_exception_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, needs in list(NEEDS_INPUT.items()):
        pipeline_class, kind = servable()[name]
        told = tasks_of(pipeline_class, kind)
        monkeypatch.delitem(NEEDS_INPUT, name)
        assert tasks_of(pipeline_class, kind) != told, name
        monkeypatch.setitem(NEEDS_INPUT, name, needs)
