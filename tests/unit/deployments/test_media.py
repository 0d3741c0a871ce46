"""Files made of pipeline outputs are compared with diffusers' pictures and read back by Pillow and PyAV."""

from __future__ import annotations

import io
import types
from typing import Any, Literal

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from deployments.errors import GenerationFailedError, InvalidRequestError
from deployments.media.files import read_metadata, write_file
from deployments.media.outputs import Making, files_to_write
from deployments.messages import Background, GenerationRequest, InputImage, OutputFormat

Format = Literal["png", "jpeg", "webp", "gif", "mp4"]


def request(
    format: Format = "png",
    *,
    quality: int | None = None,
    fps: float | None = None,
    background: Background = "opaque",
    max_frames: int | None = None,
    **arguments: Any,
):
    arguments = {"prompt": "a red fox", "num_inference_steps": 4} | arguments
    is_video = format == "mp4" or fps is not None
    output = OutputFormat("video" if is_video else "image", format, quality, fps, background, max_frames)
    return GenerationRequest("r1", "tiny", arguments, seed=7, output=output)


def encode(output: Any, request: GenerationRequest, fps: float = 8.0, audio_sample_rate: int | None = None):
    return tuple(write_file(file) for file in files_to_write(output, request, Making(fps, audio_sample_rate)))


def images(made: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(images=made)


def decoded(channels: int = 3, batch: int = 1, height: int = 24, width: int = 32) -> torch.Tensor:
    """What a VAE decoder returns: [B, C, H, W], somewhat outside -1..1."""
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def frames_of(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_pixels_equal_the_pil_pictures_of_diffusers(channels, mode, dtype):
    processor = VaeImageProcessor()
    made = decoded(channels, batch=2, height=64, width=64).to(dtype)
    expected = processor.postprocess(made, output_type="pil")

    files = encode(images(processor.postprocess(made, output_type="pt")), request(background="transparent"))

    assert len(files) == 2
    for file, picture in zip(files, expected, strict=True):
        assert (file.width, file.height, file.mime_type) == (64, 64, "image/png")
        assert opened(file.data).mode == picture.mode == mode
        assert np.array_equal(np.asarray(opened(file.data)), np.asarray(picture))


def test_every_value_between_two_grey_levels_is_rounded_as_diffusers_rounds_it():
    values = torch.linspace(0, 1, 3 * 256 * 256).reshape(1, 3, 256, 256)
    [file] = encode(images(values), request())
    [expected] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(values))
    assert np.array_equal(np.asarray(opened(file.data)), np.asarray(expected))


def test_layers_given_as_nested_lists_become_one_file_each_in_order():
    layers = torch.stack([torch.full((4, 8, 8), level) for level in (0.0, 0.2, 1.0)])
    files = encode(images([layers]), request(background="transparent"))
    assert [np.asarray(opened(file.data))[0, 0, 0] for file in files] == [0, 51, 255]


def test_pictures_that_a_pipeline_already_made_keep_their_pixels():
    picture = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    [file] = encode(images([picture]), request())
    assert np.array_equal(np.asarray(opened(file.data)), np.asarray(picture))


def test_transparency_is_kept_where_asked_and_laid_on_white_elsewhere():
    made = torch.zeros(1, 4, 16, 16)  # black, wholly transparent
    [webp] = encode(images(made), request("webp", background="transparent"))
    [jpeg] = encode(images(made), request("jpeg", background="transparent"))
    [png] = encode(images(made), request("png"))
    assert opened(png.data).mode == "RGB"
    assert np.asarray(opened(png.data)).min() == 255
    assert opened(webp.data).mode == "RGBA"
    assert np.asarray(opened(webp.data))[..., 3].max() == 0
    assert opened(jpeg.data).mode == "RGB"
    assert np.asarray(opened(jpeg.data)).min() >= 254


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_lower_quality_gives_a_smaller_file_of_the_same_size(format):
    made = VaeImageProcessor().postprocess(decoded(height=64, width=64), output_type="pt")
    sizes = []
    for quality in (0, 50, 100):
        [file] = encode(images(made), request(format, quality=quality))
        assert opened(file.data).size == (64, 64)
        assert opened(file.data).format == format.upper()
        sizes.append(len(file.data))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def smooth_video(num_frames: int = 9, height: int = 32, width: int = 48) -> torch.Tensor:
    """[1, F, C, H, W]: a gradient whose colour changes from frame to frame."""
    x = torch.linspace(0, 1, width).expand(num_frames, height, width)
    y = torch.linspace(0, 1, height)[:, None].expand(num_frames, height, width)
    t = torch.linspace(0, 1, num_frames)[:, None, None].expand(num_frames, height, width)
    return torch.stack([x, y, t], dim=1)[None]


def test_an_mp4_holds_every_frame_at_the_asked_rate_in_nearly_the_same_colours():
    made = smooth_video()
    pil = VideoProcessor().postprocess_video(made.permute(0, 2, 1, 3, 4) * 2 - 1, output_type="pil")[0]

    [file] = encode(types.SimpleNamespace(frames=made), request("mp4", fps=12.5))

    assert (file.num_frames, file.fps, file.mime_type) == (9, 12.5, "video/mp4")
    with av.open(io.BytesIO(file.data)) as container:
        [stream] = container.streams
        assert float(stream.average_rate) == 12.5
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    frames = frames_of(file.data)
    assert len(frames) == 9
    for frame, picture in zip(frames, pil, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(picture)).mean() < 4


@pytest.mark.parametrize(("format", "fps", "duration_ms"), [("gif", 5.0, 200), ("gif", 8.0, 120), ("webp", 8.0, 125)])
def test_a_moving_picture_holds_every_frame_for_as_long_as_asked_and_repeats(format, fps, duration_ms):
    made = smooth_video()
    [file] = encode(types.SimpleNamespace(frames=made), request(format, fps=fps))
    assert (file.num_frames, file.mime_type, file.fps) == (9, f"image/{format}", 1000 / duration_ms)
    animation: Any = opened(file.data)
    assert (animation.n_frames, animation.info["loop"]) == (9, 0)
    for number, frame in enumerate(made[0]):
        animation.seek(number)
        animation.load()
        assert animation.info["duration"] == duration_ms
        expected = frame.movedim(0, -1).numpy() * 255
        assert np.abs(np.asarray(animation.convert("RGB")) - expected).mean() < 12


def test_of_a_longer_video_the_first_frames_are_kept():
    [file] = encode(types.SimpleNamespace(frames=smooth_video()), request("gif", fps=5.0, max_frames=3))
    assert (file.num_frames, opened(file.data).n_frames) == (3, 3)  # type: ignore[attr-defined]
    assert read_metadata(file.data, file.mime_type)["num_frames"] == 3


def test_the_quality_of_a_moving_webp_counts():
    sizes = []
    for quality in (5, 95):
        [file] = encode(types.SimpleNamespace(frames=smooth_video()), request("webp", fps=5.0, quality=quality))
        sizes.append(len(file.data))
    assert sizes[0] < sizes[1]


def test_a_video_with_alpha_is_laid_on_white():
    made = torch.zeros(1, 2, 4, 16, 16)  # black, wholly transparent
    for format, fps in (("mp4", 8.0), ("gif", 8.0)):
        [file] = encode(types.SimpleNamespace(frames=made), request(format, fps=fps))
        first = frames_of(file.data)[0] if format == "mp4" else np.asarray(opened(file.data).convert("RGB"))
        assert first.min() >= 250


def test_an_mp4_can_be_played_before_it_is_complete():
    [file] = encode(types.SimpleNamespace(frames=smooth_video()), request("mp4"))
    assert 0 < file.data.index(b"moov") < file.data.index(b"mdat")


def test_a_video_without_a_rate_takes_that_of_the_model():
    [file] = encode(types.SimpleNamespace(frames=smooth_video()), request("mp4"), fps=24.0)
    with av.open(io.BytesIO(file.data)) as container:
        assert float(container.streams.video[0].average_rate) == 24.0


def test_odd_sides_of_a_video_repeat_the_last_row_and_column():
    made = torch.zeros(1, 3, 3, 17, 33)
    made[..., -1, :] = 1.0
    made[..., :, -1] = 1.0
    [file] = encode(types.SimpleNamespace(frames=made), request("mp4"))
    assert (file.width, file.height) == (34, 18)
    last = frames_of(file.data)[0]
    assert last.shape == (18, 34, 3)
    assert last[-1].mean() > 200
    assert last[:, -1].mean() > 200


@pytest.mark.parametrize("as_list", [list, lambda frames: list(frames[0]), lambda frames: frames[0]])
def test_a_video_may_come_as_a_list_or_alone(as_list):
    [file] = encode(types.SimpleNamespace(frames=as_list(smooth_video())), request("mp4"))
    assert file.num_frames == 9


def test_the_same_video_gives_the_same_bytes():
    made = types.SimpleNamespace(frames=smooth_video())
    assert len({encode(made, request("mp4"))[0].data for _ in range(10)}) == 1


@pytest.mark.parametrize(("channels", "shape"), [(2, (1, 2, 24_000)), (1, (1, 24_000)), (1, (24_000,))])
def test_sound_is_muxed_as_aac_at_its_pitch(channels, shape):
    rate = 24_000
    tone = torch.sin(torch.arange(rate) * 2 * torch.pi * 440 / rate) * 0.5
    made = types.SimpleNamespace(frames=smooth_video(), audio=tone.expand(shape))

    [file] = encode(made, request("mp4"), audio_sample_rate=rate)

    with av.open(io.BytesIO(file.data)) as container:
        [stream] = container.streams.audio
        assert (stream.codec_context.name, stream.sample_rate, stream.channels) == ("aac", rate, channels)
        heard = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert heard.shape[1] >= rate
    spectrum = np.abs(np.fft.rfft(heard[0, :rate]))
    assert int(spectrum.argmax()) == 440
    assert np.abs(heard[0]).max() == pytest.approx(0.5, abs=0.1)
    assert len(frames_of(file.data)) == 9


def test_sound_without_a_known_sample_rate_is_an_error():
    made = types.SimpleNamespace(frames=smooth_video(), audio=torch.zeros(1, 2, 100))
    with pytest.raises(GenerationFailedError, match="sample rate"):
        encode(made, request("mp4"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_are_an_error_not_a_black_picture(bad):
    made = torch.zeros(1, 3, 8, 8)
    made[0, 1, 2, 3] = bad
    with pytest.raises(GenerationFailedError, match="NaN"):
        encode(images(made), request())
    with pytest.raises(GenerationFailedError, match="NaN"):
        encode(types.SimpleNamespace(frames=made[None]), request("mp4"))


def test_a_picture_of_a_video_is_its_last_frame_which_may_stand_behind_given_ones():
    video = smooth_video()
    [file] = encode(types.SimpleNamespace(frames=video), request("png"))
    last = np.asarray(Image.open(io.BytesIO(file.data)))
    assert np.array_equal(last, video[0, -1].mul(255).round().byte().movedim(0, -1).numpy())


@pytest.mark.parametrize(
    ("output", "format", "says"),
    [
        (types.SimpleNamespace(audio=torch.zeros(1, 2, 100)), "png", "has no images"),
        (images(torch.zeros(1, 3, 8, 8)), "mp4", "has no frames"),
        (images(torch.zeros(1, 16, 8, 8)), "png", r"Tensor \[1, 16, 8, 8\]"),
        (images("text"), "png", "str"),
    ],
)
def test_an_output_of_another_kind_than_asked_is_an_error(output, format, says):
    with pytest.raises(GenerationFailedError, match=says):
        encode(output, request(format))


def test_what_the_models_safety_checker_flagged_is_refused_not_sent_as_black():
    made = types.SimpleNamespace(images=torch.zeros(1, 3, 8, 8), nsfw_content_detected=[True])
    with pytest.raises(InvalidRequestError) as caught:
        encode(made, request())
    assert caught.value.code == "content_policy_violation"
    made.nsfw_content_detected = [False]
    assert len(encode(made, request())) == 1


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "mp4", "gif"])
def test_each_format_carries_how_it_was_made(format):
    prompt = 'einen „Fuchs" 🦊\n狐\0'
    moves = format in ("mp4", "gif")
    picture = InputImage(b"secret")
    fps = 8.0 if moves else None
    asked = request(format, fps=fps, prompt=prompt, guidance_scale=3.5, image=picture, sigmas=[1.0, 0.5])
    made = types.SimpleNamespace(frames=smooth_video()) if moves else images(torch.zeros(1, 3, 32, 48))
    [written] = files_to_write(made, asked, Making(8.0, metadata={"steps": 3}))
    file = write_file(written)
    metadata = read_metadata(file.data, file.mime_type)
    assert {name: metadata[name] for name in ("model", "seed", "prompt", "steps", "size", "parameters")} == {
        "model": "tiny",
        "seed": 7,
        "prompt": prompt,
        "steps": 3,  # those that were made, of 4 that were asked for
        "size": "48x32",
        "parameters": {"guidance_scale": 3.5, "sigmas": [1.0, 0.5]},
    }


@pytest.mark.parametrize("format", ["png", "webp", "mp4"])
def test_a_very_long_prompt_is_kept_whole(format):
    prompt = "狐" * 20_000
    made = types.SimpleNamespace(frames=smooth_video(), images=torch.zeros(1, 3, 8, 8))
    [file] = encode(made, request(format, prompt=prompt, negative_prompt=prompt))
    assert read_metadata(file.data, file.mime_type)["prompt"] == prompt


def test_a_jpeg_says_when_its_metadata_had_to_be_shortened():
    [file] = encode(images(torch.zeros(1, 3, 8, 8)), request("jpeg", prompt="狐" * 20_000))
    metadata = read_metadata(file.data, "image/jpeg")
    assert metadata["shortened"] is True
    assert metadata["seed"] == 7
    assert metadata["prompt"] == "狐" * 5_000


def test_a_file_of_somebody_else_has_no_metadata():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="no metadata"):
        read_metadata(buffer.getvalue(), "image/png")
