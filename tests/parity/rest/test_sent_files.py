"""Each kind of file over HTTP, in each placement: the output of the unsplit call, and another than without the file."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from deployments.model import ModelArgs
from deployments.weights.parts.compose import resolve_model
from tests.support.ip_adapters import save_adapter, unet_adapter
from tests.support.model_in_process import PLACEMENTS, model_served
from tests.support.sent_files import SEED, fields_of, in_json, made_frames, pixels_of, served, unsplit
from tests.support.tiny_models import checkpoint, request_arguments
from tests.support.tiny_models.checkpoints import load_unsplit
from tests.support.tiny_models.pictures import center_mask, noise_image, noise_video

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
REFERENCES = [noise_image(64, seed=each) for each in (21, 22, 23)]
# The model, its route, and what is sent for which arguments.
PICTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a ControlNet's picture": ("flux_controlnet", GENERATIONS, {"control_image": noise_image(16, seed=5)}),
    "a mask": ("sd15_inpaint", EDITS, {"image": noise_image(32, seed=5), "mask_image": center_mask(32)}),
    "three references": ("klein_edit", EDITS, {"image": REFERENCES}),
}
VIDEOS: dict[str, tuple[str, dict[str, Any]]] = {
    "a first and a last frame": (
        "wan21_flf2v",
        {"image": noise_image(16, seed=5), "last_image": noise_image(16, seed=6)},
    ),
    "poses and a face": (
        "wan_animate",
        {"image": noise_image(16, seed=5), "pose_video": noise_video(9)[::-1], "face_video": noise_video(9)},
    ),
}


def as_sent(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [in_json(each) for each in value] if isinstance(value, list) else in_json(value)
        for name, value in given.items()
    }


def as_read(given: dict[str, Any]) -> dict[str, Any]:
    """A mask is sent as a picture of three equal colours."""
    return {name: value.convert("RGB") if name == "mask_image" else value for name, value in given.items()}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_steer_as_in_the_unsplit_call(
    kind: str, placement: str, checkpoints_root: Path, tmp_path: Path
) -> None:
    name, path, given = PICTURES[kind]
    folder = checkpoint(name, checkpoints_root)
    with model_served(folder, tmp_path / "outputs", placement) as server:
        made = served(server, path=path, json={**fields_of(name, *given), **as_sent(given)})
    assert made == unsplit(name, folder, as_read(given)) != unsplit(name, folder, {})


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", VIDEOS)
def test_frames_and_videos_steer_as_in_the_unsplit_call(
    kind: str, placement: str, checkpoints_root: Path, tmp_path: Path
) -> None:
    name, given = VIDEOS[kind]
    folder = checkpoint(name, checkpoints_root)
    with model_served(folder, tmp_path / "outputs", placement) as server:
        frames = made_frames(server, fields_of(name, *given), as_sent(given))
    assert frames == unsplit(name, folder, given) != unsplit(name, folder, {})


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_picture_of_an_ip_adapter_steers_as_in_the_unsplit_call(
    placement: str, checkpoints_root: Path, tmp_path: Path
) -> None:
    base = checkpoint("sd15", checkpoints_root)
    whole: Any = StableDiffusionPipeline.from_pretrained(base)
    save_adapter(unet_adapter(whole.unet), tmp_path / "models")
    whole.load_ip_adapter(str(tmp_path), subfolder="models", weight_name="adapter.safetensors")
    adapter: Any = {"path": str(tmp_path), "subfolder": "models", "weight_name": "adapter.safetensors"}
    model = ModelArgs(path=str(base), name="sd15", components={"ip_adapter": adapter})
    folder = resolve_model(model, tmp_path / "cache", None, use_streamer=False)
    picture = noise_image(32, seed=5)
    with model_served(folder, tmp_path / "outputs", placement) as server:
        made = served(server, path=GENERATIONS, json={**fields_of("sd15"), "ip_adapter_image": in_json(picture)})
    truths = [
        pixels_of(whole, request_arguments("sd15") | {"ip_adapter_image": each}) for each in (picture, REFERENCES[0])
    ]
    assert made == truths[0] != truths[1]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_source_sound_steers_as_in_the_unsplit_call(placement: str, checkpoints_root: Path, tmp_path: Path) -> None:
    name = "stable_audio"
    folder = checkpoint(name, checkpoints_root)
    samples = np.random.RandomState(5).randint(-20_000, 20_000, (16, 2), dtype=np.int16)
    with model_served(folder, tmp_path / "outputs", placement) as server:
        body = {each: value for each, value in request_arguments(name).items() if not each.startswith("audio_")}
        body |= {"seconds": 4, "seed": SEED, "response_format": "b64_json"}
        answers = [
            server.post("/v1/audio/generations", json=body | more)
            for more in ({"initial_audio_waveforms": sound_in_json(samples)}, {})
        ]
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
    given = torch.from_numpy(samples.T.astype(np.float32) / 32768)[None]
    torch.manual_seed(SEED)
    [waves] = load_unsplit(folder)(
        **request_arguments(name) | {"audio_end_in_s": 4.0, "initial_audio_waveforms": given},
        initial_audio_sampling_rate=4,
        generator=torch.Generator("cpu").manual_seed(SEED),
    ).audios
    heard = [base64.b64decode(answer.json()["data"][0]["b64_json"]) for answer in answers]
    assert samples_of(heard[0]) == np.rint(np.clip(np.asarray(waves), -1, 1) * 32767).astype(np.int16).T.tobytes()
    assert samples_of(heard[0]) != samples_of(heard[1])


def sound_in_json(samples: np.ndarray) -> str:
    """A wav of 4 samples a second."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((samples.shape[1], 2, 4, len(samples), "NONE", ""))
        sound.writeframes(samples.tobytes())
    return base64.b64encode(file.getvalue()).decode()


def samples_of(data: bytes) -> bytes:
    with wave.open(io.BytesIO(data)) as sound:
        return sound.readframes(sound.getnframes())
