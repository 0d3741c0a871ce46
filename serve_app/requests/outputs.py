"""What is made of a body: the kind of medium and its route, the file's format, its background, its frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deployments.errors import NotSupportedError
from deployments.messages import Background, MediaKind, OutputFormat, StageDescription
from serve_app.requests.bodies import (
    AudioGenerationBody,
    ImageGenerationBody,
    MediaBody,
    TensorsGenerationBody,
    VideoGenerationBody,
)

DEFAULT_FRAME_COUNT = 9  # OpenAI's, as that of the duration
DEFAULT_FRAME_DURATION_MS = 200


@dataclass(frozen=True)
class Medium:
    """A kind of medium as callers know it."""

    name: str  # what a model makes
    route: str  # where it is asked for
    body: type[MediaBody]


MEDIA: dict[MediaKind, Medium] = {
    "image": Medium("images", "/v1/images/generations", ImageGenerationBody),
    "video": Medium("videos", "/v1/videos", VideoGenerationBody),
    "audio": Medium("sound", "/v1/audio/generations", AudioGenerationBody),
    "tensors": Medium("tensors", "/v1/tensors/generations", TensorsGenerationBody),
}


def check_kind(wanted: MediaKind, description: StageDescription) -> None:
    """Raises NotSupportedError where the model makes another kind; the sentence says which, and by which route."""
    if wanted != description.media_kind:
        made = MEDIA[description.media_kind]
        raise NotSupportedError(
            f"{description.pipeline_class} makes {made.name}, it cannot make {MEDIA[wanted].name}: "
            f"send the request to POST {made.route}",
            "model",
        )


def asks_for_frames(body: ImageGenerationBody) -> bool:
    """Whether a moving picture is asked for where pictures are."""
    return body.output_format == "gif" or body.frame_count is not None


def picture_output(body: ImageGenerationBody, description: StageDescription) -> OutputFormat:
    """Raises NotSupportedError that names the field."""
    _drop_compression(body, ("jpeg", "webp"))
    if body.frame_duration_ms is not None:
        reason = "frame_duration_ms has no effect without moving pictures: it is for gif, and webp with frame_count"
        body.refuse(NotSupportedError(reason, "frame_duration_ms"))
    if body.background == "transparent":
        if not description.makes_alpha:
            raise NotSupportedError(
                f"background='transparent' is not supported, only 'auto' or 'opaque': {description.pipeline_class} "
                "makes pictures without alpha",
                "background",
            )
        if body.output_format == "jpeg":
            raise NotSupportedError("background='transparent' needs output_format png or webp", "background")
    if body.bit_depth == 16 and body.output_format != "png":
        raise NotSupportedError("bit_depth=16 needs output_format png", "bit_depth")
    is_kept = description.makes_alpha and body.background != "opaque" and body.output_format != "jpeg"
    background: Background = "transparent" if is_kept else "opaque"
    return OutputFormat(
        "image", body.output_format, body.output_compression, background=background, bit_depth=body.bit_depth or 8
    )


def animation_output(body: ImageGenerationBody) -> OutputFormat:
    """A moving picture; raises NotSupportedError for what OpenAI refuses with one."""
    if body.output_format not in ("gif", "webp"):
        raise NotSupportedError("frame_count is for the output formats gif and webp", "frame_count")
    for field in ("stream", "partial_images", "mask_image", "bit_depth"):
        if getattr(body, field, None):
            name = "mask" if field == "mask_image" else field
            raise NotSupportedError(f"{name} is not supported together with moving pictures", name)
    if body.background == "transparent":
        raise NotSupportedError("background='transparent' is not supported for moving pictures", "background")
    _drop_compression(body, ("webp",))
    fps = 1000 / (body.frame_duration_ms or DEFAULT_FRAME_DURATION_MS)
    frames = body.frame_count or DEFAULT_FRAME_COUNT
    output: Literal["gif", "webp"] = "gif" if body.output_format == "gif" else "webp"
    return OutputFormat("video", output, body.output_compression, fps, max_frames=frames)


def video_output(body: VideoGenerationBody, model_fps: float | None) -> OutputFormat:
    """`model_fps` counts where the body has no rate. Raises NotSupportedError that names the field."""
    _drop_compression(body, ("webp",))
    fps = body.fps or model_fps
    return OutputFormat("video", body.output_format, body.output_compression, None if fps is None else float(fps))


def _drop_compression(body: ImageGenerationBody | VideoGenerationBody, formats: tuple[str, ...]) -> None:
    if body.output_compression is not None and body.output_format not in formats:
        reason = f"output_compression has no effect on {body.output_format}, only on {' and '.join(formats)}"
        body.drop("output_compression", reason)
