"""Sound, maps, tensors and frames in other layouts become files that say what the pipeline made."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers.pipelines.marigold.pipeline_marigold_depth import MarigoldDepthOutput
from diffusers.pipelines.marigold.pipeline_marigold_normals import MarigoldNormalsOutput
from diffusers.utils import BaseOutput
from PIL import Image

from deployments.errors import GenerationFailedError, NotNumbersError, NotSupportedError, PipelineFailedError
from deployments.media.files import read_metadata, write_file
from deployments.media.outputs import Making, files_to_write
from deployments.messages import FileFormat, GenerationRequest, MediaFile, MediaKind, OutputFormat

RATE = 16_000


def files(output: Any, kind: MediaKind, format: FileFormat, rate: int | None = RATE, **changes: Any) -> list[MediaFile]:
    request = GenerationRequest("r", "tiny", {"prompt": "狐"}, 7, OutputFormat(kind, format, **changes))
    return [write_file(file) for file in files_to_write(output, request, Making(8.0, rate, {"steps": 3}))]


def tone(channels: int, seconds: float = 0.25) -> torch.Tensor:
    time = torch.arange(int(RATE * seconds)) / RATE
    return torch.stack([0.5 * torch.sin(2 * torch.pi * 440 * (each + 1) * time) for each in range(channels)])


def heard(data: bytes) -> np.ndarray:
    """[channels, time]."""
    with av.open(io.BytesIO(data), "r") as container:
        channels = container.streams.audio[0].codec_context.channels
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.concatenate([f if len(f) == channels else f.reshape(-1, channels).T for f in frames], axis=1)


def pixels(file: MediaFile) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file.data)))


def deep_pixels(file: MediaFile) -> np.ndarray:
    """[H, W, 3] of 16 bits."""
    with av.open(io.BytesIO(file.data), "r") as container:
        [frame] = container.decode(video=0)
    assert frame.format.name == "rgb48be"
    rows = np.frombuffer(memoryview(frame.planes[0]), np.uint8).reshape(frame.height, -1)
    return rows[:, : frame.width * 6].copy().view(">u2").reshape(frame.height, frame.width, 3)


# --- sound ---


@pytest.mark.parametrize("format", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_without_loss_holds_each_sample_rounded_to_16_bits(format: FileFormat, channels: int) -> None:
    wave = tone(channels)
    [file] = files(SimpleNamespace(audios=wave[None]), "audio", format)
    assert (file.sample_rate, file.channels, file.num_samples, file.seconds) == (RATE, channels, wave.shape[1], 0.25)
    assert np.array_equal(heard(file.data), np.rint(wave.numpy() * 32767).astype(np.int16))


def test_an_mp3_sounds_as_what_was_made() -> None:
    [file] = files(SimpleNamespace(audios=tone(2)[None]), "audio", "mp3")
    assert file.mime_type == "audio/mpeg"
    spectrum = np.abs(np.fft.rfft(heard(file.data)[0, 1000:3000]))
    assert int(spectrum.argmax()) == 440 * 2000 // RATE


def test_an_mp3_has_the_next_higher_rate_that_its_codec_knows() -> None:
    [file] = files(SimpleNamespace(audios=tone(1)[None]), "audio", "mp3", rate=7_000)
    assert file.sample_rate == 8_000
    assert file.seconds == pytest.approx(0.25 * RATE / 7_000, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "files_and_channels"),
    [((800,), (1, 1)), ((1, 800), (1, 1)), ((2, 800), (1, 2)), ((3, 800), (3, 1)), ((1, 2, 800), (1, 2)),
     ((2, 1, 800), (2, 1)), ((1, 800, 2), (1, 2))],
)  # fmt: skip
@pytest.mark.parametrize("form", [torch.zeros, np.zeros])
def test_the_axes_of_a_sound_are_told_by_their_lengths(shape: Any, files_and_channels: Any, form: Any) -> None:
    made = files(SimpleNamespace(audios=form(shape)), "audio", "wav")
    assert (len(made), made[0].channels) == files_and_channels
    assert all(each.num_samples == 800 for each in made)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "safetensors"])
def test_each_file_of_sound_or_tensors_carries_how_it_was_made_and_has_the_same_bytes_again(format: FileFormat) -> None:
    kind: MediaKind = "tensors" if format == "safetensors" else "audio"
    [file], [again] = (files(SimpleNamespace(audios=tone(1)[None]), kind, format) for _ in range(2))
    metadata = read_metadata(file.data, file.mime_type)
    assert (metadata["prompt"], metadata["seed"], metadata["model"], metadata["steps"]) == ("狐", 7, "tiny", 3)
    assert file.data == again.data


@pytest.mark.parametrize(
    ("made", "rate", "says"),
    [
        (SimpleNamespace(audios=torch.full((1, 800), float("nan"))), RATE, "NaN"),
        (SimpleNamespace(audios=torch.zeros(1, 3, 800)), RATE, "one or two channels"),
        (SimpleNamespace(audios=torch.zeros(1, 800)), None, "sample rate"),
        (SimpleNamespace(images=torch.zeros(1, 3, 8, 8)), RATE, "has no audios"),
    ],
)
def test_what_is_no_sound_is_an_error(made: Any, rate: int | None, says: str) -> None:
    with pytest.raises(GenerationFailedError, match=says):
        files(made, "audio", "wav", rate)


def test_a_sound_of_no_length_may_be_the_fault_of_arguments() -> None:
    with pytest.raises(PipelineFailedError, match="no length"):
        files(SimpleNamespace(audios=torch.zeros(1, 0)), "audio", "wav", RATE)


# --- maps ---


def test_a_depth_map_is_grey_and_fine_in_16_bits() -> None:
    depth = torch.linspace(0, 1, 32 * 24).reshape(1, 1, 24, 32)
    made = MarigoldDepthOutput(prediction=depth, uncertainty=None, latent=None)
    [plain], [deep] = (files(made, "image", "png", bit_depth=bits) for bits in (8, 16))
    assert np.array_equal(pixels(plain), np.rint(depth[0, 0].numpy() * 255).astype(np.uint8))
    assert np.array_equal(pixels(deep), np.rint(depth[0, 0].numpy() * 65535).astype(np.uint16))
    assert read_metadata(deep.data, "image/png")["seed"] == 7


@pytest.mark.parametrize("lowest", [-1.0, 0.25])  # a wall that faces the camera has no negative component
def test_normals_are_read_in_the_range_that_their_class_states(lowest: float) -> None:
    normals = torch.linspace(lowest, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    made = MarigoldNormalsOutput(prediction=normals, uncertainty=None, latent=None)
    expected = (normals[0] / 2 + 0.5).movedim(0, -1).numpy()
    [plain], [deep] = (files(made, "image", "png", bit_depth=bits) for bits in (8, 16))
    assert np.array_equal(pixels(plain), np.rint(expected * 255).astype(np.uint8))
    assert np.array_equal(deep_pixels(deep), np.rint(expected * 65535).astype(np.uint16))
    assert read_metadata(deep.data, "image/png")["prompt"] == "狐"


def test_the_uncertainty_follows_the_map_and_each_says_which_it_is() -> None:
    made = MarigoldDepthOutput(prediction=np.zeros((1, 8, 8, 1)), uncertainty=np.ones((1, 8, 8, 1)), latent=None)
    prediction, uncertainty = files(made, "image", "png")
    assert [read_metadata(each.data, "image/png")["output"] for each in (prediction, uncertainty)] == [
        "prediction",
        "uncertainty",
    ]
    assert (pixels(prediction).max(), pixels(uncertainty).min()) == (0, 255)


# --- pictures and frames in other forms ---


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_arrays_have_their_channels_last_and_tensors_first(channels: int, dtype: Any) -> None:
    levels = np.arange(2 * 8 * 8 * channels).reshape(2, 8, 8, channels) % 256
    array = levels.astype(dtype) if dtype == np.uint8 else (levels / 255).astype(dtype)
    array.setflags(write=False)  # as what comes out of a message
    tensor = torch.from_numpy(array.copy()).movedim(-1, 1)
    for form in (array, list(array), tensor, list(tensor)):
        made = files(SimpleNamespace(images=form), "image", "png", background="transparent")
        assert np.array_equal(np.stack([pixels(each) for each in made]).reshape(levels.shape), levels)


def video(form: Any) -> np.ndarray:
    request = GenerationRequest("r", "tiny", {}, 7, OutputFormat("video", "mp4"))
    [file] = files_to_write(SimpleNamespace(frames=form), request, Making(8.0))
    return np.stack(file.frames)


@pytest.mark.parametrize("num_frames", [1, 3, 9])
def test_frames_are_found_wherever_their_channels_are(num_frames: int) -> None:
    frames = torch.rand(1, num_frames, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = video(frames)
    raw = (frames * 2 - 1).movedim(1, 2)  # as a decoder returns them: [B, C, F, H, W] in -1..1
    assert np.abs(video(raw).astype(int) - expected).max() <= 1
    assert np.array_equal(video(frames.movedim(2, -1)), expected)
    assert np.array_equal(video(frames.movedim(2, -1).numpy()), expected)
    assert np.array_equal(video([list(frames[0])]), expected)


def test_linear_light_is_shown_as_srgb() -> None:
    request = GenerationRequest("r", "tiny", {}, 7, OutputFormat("video", "mp4"))
    light = torch.tensor([0.0, 0.002, 0.2140, 1.0, 7.5]).expand(1, 3, 5, 5)[..., None].expand(1, 3, 5, 5, 3)
    [file] = files_to_write(SimpleNamespace(frames=light), request, Making(8.0, is_linear=True))
    assert file.frames[0][0, :, 0].tolist() == [0, 7, 127, 255, 255]


# --- tensors and text ---


@dataclass
class Embeddings(BaseOutput):
    image_embeds: Any
    layers: Any
    negative_image_embeds: Any = None


def test_tensors_keep_their_names_types_and_bits() -> None:
    from safetensors.torch import load

    made = Embeddings(torch.rand(2, 3).bfloat16(), [torch.arange(4), np.ones((2, 2), np.float32)])
    [file] = files(made, "tensors", "safetensors")
    loaded = load(file.data)
    assert loaded.keys() == {"image_embeds", "layers.0", "layers.1"}
    assert torch.equal(loaded["image_embeds"], made.image_embeds)
    assert loaded["layers.0"].dtype == torch.int64
    header = json.loads(file.data[8 : 8 + int.from_bytes(file.data[:8], "little")])
    assert header["image_embeds"]["dtype"] == "BF16"


def test_tensors_with_values_that_are_not_numbers_are_an_error() -> None:
    with pytest.raises(NotNumbersError):
        files(Embeddings(torch.full((2,), float("nan")), None), "tensors", "safetensors")


def test_text_in_place_of_a_picture_is_refused_with_a_sentence() -> None:
    with pytest.raises(NotSupportedError, match="makes text of these arguments"):
        files(SimpleNamespace(images=None, text=["a fox"]), "image", "png")
