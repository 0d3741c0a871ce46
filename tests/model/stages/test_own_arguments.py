"""Files sent for the pipeline's own arguments change the output as they do in the unsplit call, with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EasyAnimateControlPipeline, StableAudioPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

from deployments.stage_pipeline.inputs.values import Waveform, as_pipeline_takes
from tests.support.model_in_process import model_served
from tests.support.sent_files import fields_of, file_of, in_json, made_frames, served, unsplit
from tests.support.tiny_models import checkpoint
from tests.support.tiny_models.pictures import center_mask, noise_image, noise_video

pytestmark = pytest.mark.filterwarnings("default")


def test_a_control_picture_steers_as_in_the_unsplit_call(checkpoints_root: Path, tmp_path: Path) -> None:
    name = "flux_controlnet"
    folder = checkpoint(name, checkpoints_root)
    fields = fields_of(name, "control_image")
    with model_served(folder, tmp_path / "outputs") as server:
        asked = {"path": "/v1/images/generations"}
        first = served(server, **asked, json={**fields, "control_image": in_json(noise_image(16, seed=5))})
        form = {each: str(value) for each, value in fields.items()}
        upload = {"control_image": ("c.png", file_of(noise_image(16, seed=6)))}
        second = served(server, **asked, data=form, files=upload)
        without = server.post("/v1/images/generations", json=fields)
    assert first == unsplit(name, folder, {"control_image": noise_image(16, seed=5)})
    assert second == unsplit(name, folder, {"control_image": noise_image(16, seed=6)}) != first
    assert (without.status_code, without.json()["error"]["param"]) == (400, "control_image")


def test_conditions_of_pictures_and_videos_reach_the_pipeline_as_its_own_objects(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    name = "ltx_condition"
    folder = checkpoint(name, checkpoints_root)
    conditions = [
        {"image": in_json(noise_image(32, seed=5)), "frame_index": 0},
        {"video": [in_json(noise_image(32, seed=each)) for each in range(9)], "frame_index": 8, "strength": 0.5},
    ]
    taken = [
        LTXVideoCondition(image=noise_image(32, seed=5), frame_index=0),
        LTXVideoCondition(video=noise_video(9, 32), frame_index=8, strength=0.5),
    ]
    changes = {"num_frames": 17, "num_inference_steps": 2}
    with model_served(folder, tmp_path / "outputs", "two_stage") as server:
        frames = made_frames(
            server, {**fields_of(name, "conditions"), **changes}, {"conditions": json.dumps(conditions)}
        )
    assert frames == unsplit(name, folder, {**changes, "conditions": taken})


@pytest.mark.rest
def test_a_video_a_mask_and_three_reference_pictures_steer_as_in_the_unsplit_call(
    checkpoints_root: Path, tmp_path: Path
) -> None:
    name = "wan_vace"
    folder = checkpoint(name, checkpoints_root)
    references = [noise_image(16, seed=each) for each in (21, 22, 23)]
    given = {
        "video": [in_json(frame) for frame in noise_video(9)],
        "mask": [in_json(center_mask(16))] * 9,
        "reference_images": [in_json(each) for each in references],
    }
    with model_served(folder, tmp_path / "outputs", "one_stage") as server:
        frames = made_frames(server, fields_of(name, *given), given)
    taken = {"video": noise_video(9), "mask": [center_mask(16).convert("RGB")] * 9, "reference_images": references}
    assert frames == unsplit(name, folder, taken)


def test_a_sound_is_a_tensor_of_the_dimensions_that_the_docstring_gives() -> None:
    sound = Waveform(np.linspace(-1, 1, 20, dtype=np.float32).reshape(2, 10))
    taken = as_pipeline_takes(StableAudioPipeline, "initial_audio_waveforms", sound)
    assert taken.shape == (1, 2, 10)
    assert torch.equal(taken[0], torch.from_numpy(sound.samples))


def test_a_video_is_a_tensor_where_the_pipeline_takes_no_pictures() -> None:
    taken = as_pipeline_takes(EasyAnimateControlPipeline, "control_video", noise_video(5))
    assert (taken.shape, taken.dtype) == ((1, 3, 5, 16, 16), torch.float32)
    assert torch.equal(taken[0, :, 2], torch.from_numpy(np.asarray(noise_video(5)[2])).permute(2, 0, 1) / 255)
    assert as_pipeline_takes(EasyAnimateControlPipeline, "ref_image", noise_image(16)).shape == (1, 3, 1, 16, 16)
