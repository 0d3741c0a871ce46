"""Progress and media count the steps that a request really makes, whatever was asked for."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.messages import STAGES, DenoisingProgress, GenerationRequest, InputImage, OutputFormat, RequestWarning
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.decode import decode
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.effects import effects_of
from deployments.stages.encode import encode
from tests.support.further import further
from tests.support.tiny_models import checkpoint


def picture() -> InputImage:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(file, "PNG")
    return InputImage(file.getvalue())


@pytest.mark.parametrize("is_counted_at_the_door", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sd15_img2img", {"image": picture(), "strength": 0.5, "num_inference_steps": 8}),
        further("flux", {"sigmas": [1.0, 0.6, 0.3], "num_inference_steps": 28, "height": 32, "width": 32}),
    ],
)
def test_progress_ends_at_the_steps_that_were_made_and_the_file_says_them(
    name: str, arguments: dict[str, Any], is_counted_at_the_door: bool, checkpoints_root: Path
) -> None:
    encoder, transformer, vae = (load_stage(checkpoint(name, checkpoints_root), (stage,)) for stage in STAGES)
    left_out = RequestWarning("no_effect", "eta", "eta has no effect")
    of_the_moment = RequestWarning("not_checked", "extra_args", "the encoder has not answered in time")
    request = GenerationRequest(
        "r",
        "m",
        {"prompt": "a cat"} | arguments,
        1,
        OutputFormat("image", "png"),
        warnings=(left_out, of_the_moment),
        left_out=(left_out,),
    )
    if is_counted_at_the_door:
        request = dataclasses.replace(request, num_steps=effects_of(encoder, request, ()).num_steps)
    told: list[DenoisingProgress] = []
    denoiser = DenoiserStage(transformer)
    inputs, run = denoiser.denoise(request, encode(encoder, request), follower=DenoisingFollower(progress=told.append))
    denoiser.engine.close()
    assert {progress.num_steps for progress in told} == {len(told)}
    assert (inputs.num_steps, run.session.steps_done) == (len(told), len(told))
    assert len(told) < arguments["num_inference_steps"]
    assert run.remaining_forwards() == 0
    [file] = decode(vae, request, inputs).files
    assert file.metadata["steps"] == len(told)
    assert file.metadata["warnings"] == [dataclasses.asdict(left_out)]
