"""Files sent for the pipeline's own arguments change the output as they do in the unsplit call, with the same bytes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EasyAnimateControlPipeline, StableAudioPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from deployments.media.outputs import Making, files_to_write
from deployments.messages import GenerationRequest, OutputFormat
from deployments.stage_pipeline.inputs.values import Waveform, as_pipeline_takes
from tests.support.model_in_process import ModelServer, model_served
from tests.support.tiny_models import checkpoint, request_arguments
from tests.support.tiny_models.checkpoints import load_unsplit
from tests.support.tiny_models.pictures import center_mask, noise_image, noise_video

pytestmark = pytest.mark.filterwarnings("default")

SEED = 3


def file_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return file.getvalue()


def in_json(picture: Image.Image) -> str:
    return base64.b64encode(file_of(picture)).decode()


def unsplit(name: str, folder: Path, changes: dict[str, Any]) -> list[bytes]:
    """The pixels of what the whole pipeline makes of the model's own request with these arguments."""
    arguments = request_arguments(name) | changes
    torch.manual_seed(SEED)
    with torch.no_grad():
        output = load_unsplit(folder)(**arguments, generator=torch.Generator("cpu").manual_seed(SEED), output_type="pt")
    kind = "video" if hasattr(output, "frames") else "image"
    request = GenerationRequest("r", name, {}, SEED, OutputFormat(kind, "mp4" if kind == "video" else "png"))
    [file] = files_to_write(output, request, Making(8.0))
    return [frame.tobytes() for frame in file.frames]


def served(server: ModelServer, **asked: Any) -> list[bytes]:
    """The pixels of the answer, a picture or a moving WebP without loss."""
    answer = server.post(**asked)
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return [np.asarray(Image.open(io.BytesIO(data))).tobytes()]


def fields_of(name: str, *left_out: str) -> dict[str, Any]:
    """The model's own request in the words of a body."""
    fields = {each: value for each, value in request_arguments(name).items() if each not in left_out}
    size = f"{fields.pop('width', 16)}x{fields.pop('height', 16)}"
    return {**fields, "size": size, "seed": SEED}


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


def made_frames(server: ModelServer, fields: dict[str, Any], given: dict[str, Any]) -> list[bytes]:
    """The frames that the decoder stage made, before they become a file that loses some of them."""
    answer = server.post("/v1/videos/generations", json={**fields, **given, "response_format": "b64_json"})
    assert answer.status_code == 200, answer.text
    request = server.handle.requests[-1]
    decoded = server.handle.decoded[request.request_id]
    return [frame.tobytes() for frame in decoded.files[0].frames]


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
