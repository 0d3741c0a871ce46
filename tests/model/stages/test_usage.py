"""What is told of a model's channels and of a request's tokens, of tiny models with the real classes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deployments.media.files import FileToWrite
from deployments.messages import GenerationRequest, InputImage, OutputFormat, Usage
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stages.encode import encode
from deployments.stages.usage import usage_of
from tests.support.tiny_models import checkpoint

PROMPT = "a small cat"


@pytest.fixture(scope="module")
def layered(checkpoints_root: Path) -> StagePipeline:
    return load_stage(checkpoint("qwen_layered", checkpoints_root))


def png(size: tuple[int, int]) -> InputImage:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return InputImage(file.getvalue())


def pixels(width: int, height: int, num_frames: int = 1) -> FileToWrite:
    return FileToWrite("png", [np.zeros((height, width, 3), np.uint8)] * num_frames, {})


def request(**arguments: object) -> GenerationRequest:
    return GenerationRequest("r", "m", {"prompt": PROMPT, **arguments}, 0, OutputFormat("image", "png"))


def test_a_picture_counts_the_places_of_its_latents_and_a_text_its_tokens(flux_checkpoint: Path) -> None:
    stage = load_stage(flux_checkpoint, ("vae",))
    side = describe_stage(stage).size_multiple
    words = len(stage.pipeline.tokenizer.tokenize(PROMPT))
    assert words > 0
    pictures = [png((side, side)), png((side + 1, 2 * side))]
    asked = request(negative_prompt=PROMPT, image=pictures, mask_image=png((side, side)))
    assert usage_of(stage, asked, (pixels(4 * side, 2 * side),)) == Usage(2 * words, 1 + 4 + 1, 8)


def test_a_video_counts_the_frames_of_its_latents(checkpoints_root: Path) -> None:
    stage = load_stage(checkpoint("wan22", checkpoints_root), ("vae",))
    description = describe_stage(stage)
    side, frames = description.size_multiple, description.frame_multiple
    assert frames == stage.pipeline.vae_scale_factor_temporal > 1
    for num_frames, latent_frames in ((1, 1), (1 + frames, 2), (2 + frames, 3)):
        assert usage_of(stage, request(), (pixels(side, side, num_frames),)).output_tokens == latent_frames


def test_a_model_of_four_channels_says_so_and_takes_a_picture_of_three(
    layered: StagePipeline, flux_checkpoint: Path
) -> None:
    assert describe_stage(layered).makes_alpha
    assert not describe_stage(load_stage(flux_checkpoint, ("vae",))).makes_alpha
    assert encode(layered, request(image=png((32, 32)), layers=2, num_inference_steps=4)).calls.num_bytes > 0
