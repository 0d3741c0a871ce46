"""Videos that callers send, read into pictures: within limits, and without letting the file choose what is opened."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import av
from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.messages import InputImage
from serve_app.requests.limits import RequestLimits

# By the first bytes of a file. FFmpeg's own guess would also open play lists, which name files and addresses to open.
CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1aE\xdf\xa3", "matroska"))  # offset, bytes, FFmpeg's name; WebM is Matroska
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4")
MAX_TOTAL_PIXELS = 120_000_000  # width x height x frames: 257 frames of 832x480, about 360 MB unpacked
PNG_COMPRESSION = 1  # the frames travel between processes of one cluster


@dataclass(frozen=True)
class ReadVideo:
    """The frames of a video as PNG files, all of `width` x `height` pixels."""

    frames: list[InputImage]
    width: int
    height: int
    fps: float | None


def container_of(data: bytes) -> str | None:
    """FFmpeg's name of the file's format; None if it is none that is read here."""
    for offset, signature, name in CONTAINERS:
        if data[offset : offset + len(signature)] == signature:
            return name
    return None


def read_video(data: bytes, limits: RequestLimits, last_frame_only: bool = False) -> ReadVideo:
    """Raises InvalidRequestError for what cannot be read to its end, and for what is above a limit."""
    try:
        with av.open(io.BytesIO(data), "r", format=container_of(data)) as file:
            [stream, *_] = file.streams.video
            if stream.codec_context is None or stream.codec_context.name not in CODECS:
                raise InvalidRequestError(f"video: the codec must be one of {', '.join(CODECS)}", "video")
            stream.codec_context.thread_count = 1  # a video of a caller does not take the machine
            rate = stream.average_rate
            last: Image.Image | None = None
            frames = []
            for frame in _frames(file, stream, limits):
                last = frame
                if not last_frame_only:
                    frames.append(_png(frame))
            if last is None:
                raise ValueError("no frames")
    except (av.FFmpegError, ValueError, OSError, EOFError) as error:
        raise InvalidRequestError(
            "video must be a complete MP4 or WebM file; it cannot be read as one", "video"
        ) from error
    if last_frame_only:
        frames = [_png(last)]
    return ReadVideo(frames, *last.size, fps=float(rate) if rate else None)


def _frames(file: av.container.InputContainer, stream: av.VideoStream, limits: RequestLimits) -> Iterator[Image.Image]:
    """Raises InvalidRequestError at the first frame that is too large or too many, before its pixels are converted."""
    total_pixels = 0
    size: tuple[int, int] | None = None
    _check_pixels(stream.codec_context.width, stream.codec_context.height, limits)
    for number, frame in enumerate(file.decode(stream), 1):
        total_pixels += frame.width * frame.height
        _check_pixels(frame.width, frame.height, limits)
        if number > limits.max_frames:
            raise _above("frames", limits.max_frames)
        if total_pixels > MAX_TOTAL_PIXELS:
            raise _above("pixels (width x height x frames)", MAX_TOTAL_PIXELS)
        if size not in (None, (frame.width, frame.height)):
            raise InvalidRequestError("video: all frames must have the same size", "video")
        size = frame.width, frame.height
        yield Image.fromarray(frame.to_ndarray(format="rgb24"))


def _check_pixels(width: int, height: int, limits: RequestLimits) -> None:
    if width * height > limits.max_input_pixels:
        raise _above("pixels (width x height)", limits.max_input_pixels)


def _above(unit: str, limit: int) -> InvalidRequestError:
    return InvalidRequestError(f"video: at most {limit} {unit}", "video", "limit_exceeded")


def _png(picture: Image.Image) -> InputImage:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=PNG_COMPRESSION)
    return InputImage(file.getvalue())
