"""Which arguments matter on a checkpoint, and how many steps are made: plays of pipelines against what they do."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, PNDMScheduler
from PIL import Image

from deployments.messages import Effects, GenerationRequest, InputImage, OutputFormat
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stages.effects import arguments_of, effects_of
from tests.support.further import further
from tests.support.tiny_models import checkpoint

STAGES: dict[str, StagePipeline] = {}


def stage(name: str, root: Path, **transformer: Any) -> StagePipeline:
    key = f"{name}{transformer}"
    if key not in STAGES:
        folder = checkpoint(name, root)
        if transformer:
            folder = Path(shutil.copytree(folder, root / f"{name}-changed"))
            config = folder / "transformer" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | transformer))
        STAGES[key] = load_stage(folder, ("encoder",))
    return STAGES[key]


def judged(pipeline: StagePipeline, **arguments: Any) -> Effects:
    arguments = {"prompt": "a small cat", "num_inference_steps": 6} | arguments
    request = GenerationRequest("r", "m", arguments, 1, OutputFormat("image", "png"))
    return effects_of(pipeline, request, tuple(name for name in arguments if name != "prompt"))


def picture() -> InputImage:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 30, 30)).save(file, "PNG")
    return InputImage(file.getvalue())


@pytest.mark.parametrize(
    ("name", "arguments", "without"),
    [
        ("sd15", {"negative_prompt": "rain", "guidance_scale": 1.0}, {"negative_prompt": "guidance_scale=5"}),
        further("sd15", {"negative_prompt": "rain", "guidance_scale": 5.0}, {}),
        further("sd15", {"guidance_scale": 1.0, "guidance_rescale": 0.5}, {"guidance_rescale": "guidance_scale=5"}),
        further("sd15", {"clip_skip": 1, "width": 64, "height": 64}, {}),
        ("sd15_img2img", {"image": picture(), "strength": 0.5, "guidance_scale": 3.0}, {}),
        further("flux", {"guidance_scale": 3.5, "max_sequence_length": 16}, {}),
        ("flux", {"true_cfg_scale": 3.0}, {"true_cfg_scale": "with negative_prompt"}),
        further("flux", {"negative_prompt": "rain"}, {"negative_prompt": "with true_cfg_scale=5"}),
        further(
            "flux", {"negative_prompt_2": "rain"}, {"negative_prompt_2": "negative_prompt and with true_cfg_scale=5"}
        ),
        ("flux", {"sigmas": [1.0, 0.5]}, {"num_inference_steps": "without sigmas"}),
    ],
)
def test_an_argument_that_changes_nothing_is_found_with_what_it_would_matter(
    name: str, arguments: dict[str, Any], without: dict[str, str], checkpoints_root: Path
) -> None:
    found = judged(stage(name, checkpoints_root), **arguments).without
    assert found.keys() == without.keys()
    for argument, words in without.items():
        assert words in found[argument]


def test_guidance_that_the_checkpoint_does_not_embed_is_not_read(checkpoints_root: Path, tmp_path: Path) -> None:
    checkpoint("flux", tmp_path)
    schnell = stage("flux", tmp_path, guidance_embeds=False)
    assert judged(schnell, guidance_scale=3.5).without == {"guidance_scale": "this model does not read it"}
    names = ("prompt", "guidance_scale", "true_cfg_scale", "negative_prompt", "num_inference_steps")
    told = {each.name: each for each in arguments_of(schnell, names, {"num_inference_steps": 3})}
    assert "guidance_scale" not in told
    assert (told["num_inference_steps"].default, told["num_inference_steps"].when) == (3, "always")
    assert (told["true_cfg_scale"].type, told["true_cfg_scale"].when) == ("number", "with negative_prompt")


def test_a_default_that_is_a_list_is_told_as_it_is_configured(checkpoints_root: Path) -> None:
    told = arguments_of(stage("flux", checkpoints_root), ("prompt", "sigmas"), {"sigmas": [1.0, 0.5]})
    assert [(each.name, each.default) for each in told] == [("prompt", None), ("sigmas", [1.0, 0.5])]


def test_eta_matters_with_the_schedulers_that_take_it(checkpoints_root: Path) -> None:
    pipeline = stage("sd15", checkpoints_root)
    assert isinstance(pipeline.pipeline.scheduler, PNDMScheduler)
    assert judged(pipeline, eta=0.5).without == {"eta": "this model does not read it"}
    private = copy.copy(pipeline.pipeline)
    private.scheduler = DDIMScheduler.from_config(pipeline.pipeline.scheduler.config)
    assert judged(dataclasses.replace(pipeline, pipeline=private), eta=0.5, timesteps=[900, 500]).without == {}


@pytest.mark.parametrize(
    ("name", "arguments", "steps"),
    [
        further("sd15", {}, 6),
        ("sd15_img2img", {"image": picture(), "strength": 0.5}, 3),
        ("flux", {"sigmas": [1.0, 0.7, 0.2]}, 3),
        further("flux", {"num_inference_steps": 9}, 9),
    ],
)
def test_the_steps_are_those_that_the_pipeline_makes(
    name: str, arguments: dict[str, Any], steps: int, checkpoints_root: Path
) -> None:
    counted = judged(stage(name, checkpoints_root), **arguments).num_steps
    assert counted is not None
    assert counted - steps in (0, 1)  # PNDM makes its first step twice


def test_what_cannot_be_played_is_taken_to_matter(checkpoints_root: Path) -> None:
    assert judged(stage("flux", checkpoints_root), sigmas=["a", "b"]) == Effects()
