"""Between a pipeline and files: what it returned becomes pictures, videos, sounds or tensors to be written."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.adapters.use import named
from deployments.errors import GenerationFailedError, InvalidRequestError, NotNumbersError, NotSupportedError
from deployments.media.fields import FIELDS_OF, MAPS, TEXTS
from deployments.media.files import FileToWrite, Pixels, Samples, TensorToWrite, laid_on_white, on_white
from deployments.media.pixels import Reading, as_tensor, described, each_video, reading_of_map, to_pixels
from deployments.media.samples import to_tracks
from deployments.messages import GenerationRequest, InputFile

FLAGS = ("nsfw_content_detected", "nsfw_detected")  # of pipelines with a safety checker
IN_THE_FILE_ITSELF = ("prompt", "num_inference_steps", "num_frames", "width", "height")


@dataclasses.dataclass(frozen=True)
class Making:
    """What is known of the making besides the request."""

    fps: float  # frames per second of a video whose request has no rate
    sample_rate: int | None = None  # samples per second of the sound; None: not known
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)  # more of the files
    is_linear: bool = False  # the frames are linear light


def files_to_write(output: Any, request: GenerationRequest, making: Making) -> tuple[FileToWrite, ...]:
    """What is in the files of one request, and how they are to be written.

    `output` is what a diffusers pipeline returned. Its pictures and frames are tensors (channels before the sides),
    arrays (behind them), PIL images or nested lists of them; a video may come with sound, -1..1. Maps of depth,
    normals and uncertainty are pictures, written after the others.

    Raises NotNumbersError for values that are not finite (a black picture otherwise), GenerationFailedError for an
    output that is not what was asked for; InvalidRequestError if the model's own safety checker refused the picture,
    NotSupportedError if it made text.
    """
    _refuse_flagged(output)
    match request.output.kind:
        case "video":
            return _videos(output, request, making)
        case "image":
            return _pictures(output, request, making)
        case "audio":
            return _sounds(output, request, making)
        case "tensors":
            return (_tensors(output, request, making),)


def _refuse_flagged(output: Any) -> None:
    """A pipeline with a safety checker blackens what it flags; say so instead."""
    for name in FLAGS:
        if any(getattr(output, name, None) or []):
            raise InvalidRequestError(
                "the model's safety checker refused what this prompt and seed made",
                param="prompt",
                code="content_policy_violation",
            )


def _first_of(output: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


# --- pictures ---


def _pictures(output: Any, request: GenerationRequest, making: Making) -> tuple[FileToWrite, ...]:
    bit_depth = request.output.bit_depth
    plain = Reading(bit_depth, is_linear=making.is_linear)
    names = [name for name in (*FIELDS_OF["image"], *MAPS) if getattr(output, name, None) is not None]
    made = {
        name: to_pixels(getattr(output, name), reading_of_map(output, name, bit_depth) if name in MAPS else plain)
        for name in dict.fromkeys(names)
    }
    if not made and (videos := _first_of(output, FIELDS_OF["video"])) is not None:
        # A preview, which may stand behind given frames.
        made = {"frames": to_pixels([video[-1] for video in each_video(videos)], plain)}
    if not made:
        raise _not_made(output, "a picture", "images")
    several = len(made) > 1
    return tuple(
        _picture_file(pixels, request, making.metadata | ({"output": name} if several else {}))
        for name, pictures in made.items()
        for pixels in pictures
    )


def _not_made(output: Any, wanted: str, field: str) -> Exception:
    if any(getattr(output, name, None) is not None for name in TEXTS):
        return NotSupportedError(
            f"the model makes text of these arguments, which is not served; {wanted} was asked for"
        )
    return GenerationFailedError(f"{wanted} was asked for, but {type(output).__name__} has no {field}")


def _picture_file(pixels: Pixels, request: GenerationRequest, more: dict[str, Any]) -> FileToWrite:
    height, width = pixels.shape[:2]
    metadata = _metadata(request, f"{width}x{height}") | more
    if request.output.background == "opaque" and pixels.shape[2] == 4:
        pixels = laid_on_white(pixels)
    return FileToWrite(request.output.format, [pixels], metadata, request.output.quality)


# --- videos ---


def _videos(output: Any, request: GenerationRequest, making: Making) -> tuple[FileToWrite, ...]:
    frames_of_all = _first_of(output, FIELDS_OF["video"])
    if frames_of_all is None:
        raise _not_made(output, "a video", "frames")
    reading = Reading(is_linear=making.is_linear)
    videos = [to_pixels(video, reading) for video in each_video(frames_of_all)]
    audio = _first_of(output, FIELDS_OF["audio"])
    if audio is not None and making.sample_rate is None:
        raise GenerationFailedError("the model made audio, but its sample rate is not known")
    tracks: list[Samples | None] = [None] * len(videos)
    if audio is not None:
        tracks = list(_tracks_of_videos(audio, len(videos)))
    return tuple(_video_file(frames, samples, request, making) for frames, samples in zip(videos, tracks, strict=True))


def _tracks_of_videos(audio: Any, num_videos: int) -> list[Samples]:
    tracks = to_tracks(audio)
    if len(tracks) != num_videos:
        raise GenerationFailedError(f"the model made {len(tracks)} sounds for {num_videos} videos")
    return tracks


def _video_file(
    frames: list[Pixels], samples: Samples | None, request: GenerationRequest, making: Making
) -> FileToWrite:
    fps = request.output.fps or making.fps
    frames = frames[: request.output.max_frames]
    height, width = frames[0].shape[:2]
    length = {"num_frames": len(frames), "fps": fps, "seconds": len(frames) / fps}
    if request.output.format != "mp4":
        if frames[0].shape[2] == 4:
            frames = [np.asarray(on_white(Image.fromarray(frame))) for frame in frames]
        metadata = _metadata(request, f"{width}x{height}") | length | making.metadata
        return FileToWrite(request.output.format, frames, metadata, request.output.quality, fps)
    width, height = (side + side % 2 for side in (width, height))  # an odd side is written one pixel longer
    metadata = _metadata(request, f"{width}x{height}") | length | making.metadata
    rate = making.sample_rate or 0
    return FileToWrite("mp4", frames, metadata, fps=fps, samples=samples, sample_rate=rate)


# --- sounds ---


def _sounds(output: Any, request: GenerationRequest, making: Making) -> tuple[FileToWrite, ...]:
    audio = _first_of(output, FIELDS_OF["audio"])
    if audio is None:
        raise _not_made(output, "sound", "audios")
    rate = making.sample_rate
    if rate is None:
        raise GenerationFailedError("the model made sound, but its sample rate is not known")
    return tuple(
        FileToWrite(
            request.output.format,
            metadata=_metadata(request) | {"seconds": track.shape[1] / rate} | making.metadata,
            samples=track,
            sample_rate=rate,
        )
        for track in to_tracks(audio)
    )


# --- tensors ---


def _tensors(output: Any, request: GenerationRequest, making: Making) -> FileToWrite:
    """One file with every field of the output that holds numbers, by its name; those of a list have numbers behind."""
    names = [each.name for each in dataclasses.fields(output)] if dataclasses.is_dataclass(output) else vars(output)
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(output, name)
        if isinstance(value, list | tuple):
            found |= {f"{name}.{number}": each for number, each in enumerate(value)}
        else:
            found[name] = value
    numbers = {name: value for name, value in found.items() if isinstance(value, np.ndarray | torch.Tensor)}
    if not numbers:
        raise GenerationFailedError(f"tensors were asked for, but {described(output)} has none")
    return FileToWrite(
        request.output.format,
        metadata=_metadata(request) | making.metadata,
        tensors=tuple(_tensor(name, as_tensor(value)) for name, value in numbers.items()),
    )


def _tensor(name: str, value: torch.Tensor) -> TensorToWrite:
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise NotNumbersError
    value = value.cpu().contiguous()
    data = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0, np.uint8)
    return TensorToWrite(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), data)


# --- metadata ---


def _metadata(request: GenerationRequest, size: str | None = None) -> dict[str, Any]:
    parameters = {
        name: value
        for name, value in request.arguments.items()
        if name not in IN_THE_FILE_ITSELF and not _holds_file(value)
    }
    seen = {} if size is None else {"size": size}
    return {
        "model": request.model,
        "seed": request.seed,
        "prompt": request.arguments.get("prompt"),
        **seen,
        "parameters": parameters,
        **({"loras": loras} if (loras := named(request.features)) else {}),
    }


def _holds_file(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_file(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_file(item) for item in value.values())
    return isinstance(value, InputFile)
