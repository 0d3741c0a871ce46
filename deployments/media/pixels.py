"""Between a pipeline and files: what it returned becomes pixels to be written."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.errors import GenerationFailedError, InvalidRequestError, NotNumbersError
from deployments.media.files import FileToWrite, Pixels, Samples, on_white
from deployments.messages import GenerationRequest, InputFile


def files_to_write(
    output: Any,
    request: GenerationRequest,
    default_fps: float,
    audio_sample_rate: int | None,
    made: dict[str, Any] | None = None,
) -> tuple[FileToWrite, ...]:
    """The pixels of the files of one request, and how they are to be written; `made`: more metadata of the files.

    `output` is what a diffusers pipeline returned with output_type="pt": `.images` [B, C, H, W] or `.frames`
    [B, F, C, H, W] with values in 0..1, or (nested) lists of them; a video may come with `.audio`
    [B, channels, time] in -1..1, sampled `audio_sample_rate` times a second. Pixels are rounded as diffusers
    rounds them for PIL; values outside 0..1 are clipped. Without `request.output.fps` a video plays
    `default_fps` frames a second.

    Raises NotNumbersError for values that are not finite (a black picture otherwise), GenerationFailedError for an
    output that is not what was asked for; InvalidRequestError if the model's own safety checker refused the picture.
    """
    _refuse_flagged(output)
    if request.output.kind == "video":
        return _videos(output, request, made or {}, request.output.fps or default_fps, audio_sample_rate)
    return _pictures(output, request, made or {})


def _refuse_flagged(output: Any) -> None:
    """A pipeline with a safety checker blackens what it flags; say so instead."""
    flags = getattr(output, "nsfw_content_detected", None) or []
    if any(flags):
        raise InvalidRequestError(
            "the model's safety checker refused what this prompt and seed made",
            param="prompt",
            code="content_policy_violation",
        )


# --- pictures ---


def _pictures(output: Any, request: GenerationRequest, made: dict[str, Any]) -> tuple[FileToWrite, ...]:
    pictures = _first_of(output, ("images", "image"))
    if pictures is None and (videos := _first_of(output, ("frames", "video"))) is not None:
        pictures = [video[-1] for video in _each_video(videos)]  # a preview, which may stand behind given frames
    if pictures is None:
        raise GenerationFailedError(f"a picture was asked for, but {type(output).__name__} has no images")
    return tuple(_picture_file(pixels, request, made) for pixels in _to_pixels(pictures))


def _picture_file(pixels: Pixels, request: GenerationRequest, made: dict[str, Any]) -> FileToWrite:
    height, width = pixels.shape[:2]
    metadata = _metadata(request, width, height) | made
    if request.output.background == "opaque" and pixels.shape[2] == 4:
        pixels = np.asarray(on_white(Image.fromarray(pixels)))
    return FileToWrite(request.output.format, [pixels], metadata, request.output.quality)


def _to_pixels(made: Any) -> list[Pixels]:
    """Each picture of a tensor [..., C, H, W] in 0..1, of a PIL image, or of nested lists of them."""
    if isinstance(made, list | tuple):
        return [pixels for item in made for pixels in _to_pixels(item)]
    if isinstance(made, Image.Image):  # some pipelines return these whatever the output_type
        if made.mode != "L":
            made = made.convert("RGBA" if made.has_transparency_data else "RGB")
        return [np.asarray(made).reshape(made.height, made.width, -1)]
    if not isinstance(made, torch.Tensor) or made.ndim < 3 or made.shape[-3] not in (1, 3, 4):
        raise GenerationFailedError(
            f"cannot write {_described(made)} as pictures: a tensor [..., C, H, W] with C 1, 3 or 4 is needed"
        )
    if not torch.isfinite(made).all():
        raise NotNumbersError
    # numpy_to_pil of diffusers.image_processor, before the copy from the device: a quarter of the bytes
    rounded = made.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    height, width = made.shape[-2:]
    return list(rounded.movedim(-3, -1).reshape(-1, height, width, made.shape[-3]).cpu().numpy())


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {list(shape)}"


# --- videos ---


def _videos(
    output: Any, request: GenerationRequest, made: dict[str, Any], fps: float, audio_sample_rate: int | None
) -> tuple[FileToWrite, ...]:
    frames_of_all = _first_of(output, ("frames", "video"))
    if frames_of_all is None:
        raise GenerationFailedError(f"a video was asked for, but {type(output).__name__} has no frames")
    audio = _first_of(output, ("audio", "sound"))
    if audio is not None and audio_sample_rate is None:
        raise GenerationFailedError("the model made audio, but its sample rate is not known")
    videos = [_to_pixels(video) for video in _each_video(frames_of_all)]
    tracks = [None] * len(videos) if audio is None else _to_samples(audio, len(videos))
    return tuple(
        _video_file(frames, samples, request, made, fps, audio_sample_rate or 0)
        for frames, samples in zip(videos, tracks, strict=True)
    )


def _first_of(output: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


def _each_video(made: Any) -> list[Any]:
    """The videos of a batch; a lone video [F, C, H, W], or a list of frames, is a batch of one."""
    if isinstance(made, torch.Tensor):
        return list(made) if made.ndim == 5 else [made]
    is_frame = isinstance(made[0], Image.Image) or getattr(made[0], "ndim", 0) == 3
    return [made] if is_frame else list(made)


def _video_file(
    frames: list[Pixels],
    samples: Samples | None,
    request: GenerationRequest,
    made: dict[str, Any],
    fps: float,
    audio_sample_rate: int,
) -> FileToWrite:
    frames = frames[: request.output.max_frames]
    height, width = frames[0].shape[:2]
    length = {"num_frames": len(frames), "fps": fps, "seconds": len(frames) / fps}
    if request.output.format != "mp4":
        if frames[0].shape[2] == 4:
            frames = [np.asarray(on_white(Image.fromarray(frame))) for frame in frames]
        metadata = _metadata(request, width, height) | length | made
        return FileToWrite(request.output.format, frames, metadata, request.output.quality, fps)
    width, height = (side + side % 2 for side in (width, height))  # an odd side is written one pixel longer
    metadata = _metadata(request, width, height) | length | made
    return FileToWrite("mp4", frames, metadata, fps=fps, samples=samples, sample_rate=audio_sample_rate)


def _to_samples(audio: Any, num_videos: int) -> list[Samples]:
    """The tracks of a batch: [B, channels, time], [B, time] or, for one video, [channels, time] or [time]."""
    waves = torch.as_tensor(audio).detach().float().cpu()
    if not torch.isfinite(waves).all():
        raise NotNumbersError("the model made sound with values that are not numbers (NaN or infinite)")
    tracks = waves.reshape(num_videos, -1, waves.shape[-1]).clamp(-1, 1)
    if tracks.shape[1] > 2:
        raise GenerationFailedError(f"sound has one or two channels, the model made {tracks.shape[1]}")
    return [np.ascontiguousarray(track) for track in tracks.numpy()]


# --- metadata ---


def _metadata(request: GenerationRequest, width: int, height: int) -> dict[str, Any]:
    parameters = {
        name: value
        for name, value in request.arguments.items()
        if name not in ("prompt", "num_inference_steps", "num_frames", "width", "height") and not _holds_file(value)
    }
    return {
        "model": request.model,
        "seed": request.seed,
        "prompt": request.arguments.get("prompt"),
        "size": f"{width}x{height}",
        "parameters": parameters,
    }


def _holds_file(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(_holds_file(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, InputFile)
