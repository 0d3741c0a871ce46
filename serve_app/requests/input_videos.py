"""Videos that callers send, read into pictures: within limits, and without letting the file choose what is opened."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.sidedata.sidedata import Type as SideData
from PIL import Image, ImageSequence

from deployments.errors import InvalidRequestError
from deployments.media.opening import laid_on_white, opened_picture
from deployments.messages import InputImage
from serve_app.requests.limits import RequestLimits

# By the first bytes of a file. FFmpeg's own guess would also open play lists, which name files and addresses to open.
CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1aE\xdf\xa3", "matroska"))  # offset, bytes, FFmpeg's name; WebM is Matroska
ANIMATIONS = (b"GIF87a", b"GIF89a", b"RIFF")  # moving pictures, which Pillow reads
VIDEO_FILE = "an MP4, WebM or MOV file, a GIF or a moving WebP"
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4")
MAX_TOTAL_PIXELS = 120_000_000  # width x height x frames: 257 frames of 832x480, about 360 MB unpacked
PNG_COMPRESSION = 1  # the frames travel between processes of one cluster


# What a display matrix (ISO/IEC 14496-12, 8.3.2) does to a picture, by the signs of its a, b, c and d.
TURNS: dict[tuple[int, ...], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class ReadVideo:
    """The frames of a video as a player shows them, upright and with square pixels, as PNG files of one size."""

    frames: list[InputImage]
    width: int
    height: int
    fps: float | None


def container_of(data: bytes) -> str | None:
    """FFmpeg's name of the file's format, or `animation`; None if it is none that is read here."""
    if data.startswith(ANIMATIONS):
        return "animation"
    for offset, signature, name in CONTAINERS:
        if data[offset : offset + len(signature)] == signature:
            return name
    return None


def read_video(data: bytes, limits: RequestLimits, last_frame_only: bool = False) -> ReadVideo:
    """Raises InvalidRequestError for what cannot be read to its end, and for what is above a limit."""
    is_animation = container_of(data) == "animation"
    pictures: list[InputImage] = []
    last: Image.Image | None = None
    rate: float | None = None
    try:
        for frame, its_rate in _within(limits, _animation(data, limits) if is_animation else _video(data, limits)):
            last, rate = frame, its_rate
            if not last_frame_only:
                pictures.append(_png(frame))
        if last is None:
            raise ValueError("no frames")
    except (av.FFmpegError, ValueError, OSError, EOFError, SyntaxError, LookupError, struct.error) as error:
        raise InvalidRequestError(f"video must be {VIDEO_FILE}, complete; it cannot be read as one", "video") from error
    if last_frame_only:
        pictures = [_png(last)]
    return ReadVideo(pictures, *last.size, fps=rate)


Frames = Iterator[tuple[Image.Image, float | None]]  # with the rate of all, in frames per second


def _within(limits: RequestLimits, frames: Frames) -> Frames:
    """Raises InvalidRequestError at the first frame that is too large, one too many, or of another size."""
    total_pixels = 0
    size: tuple[int, int] | None = None
    for number, (frame, rate) in enumerate(frames, 1):
        total_pixels += frame.width * frame.height
        _check_pixels(*frame.size, limits)
        if number > limits.max_frames:
            raise _above("frames", limits.max_frames)
        if total_pixels > MAX_TOTAL_PIXELS:
            raise _above("pixels (width x height x frames)", MAX_TOTAL_PIXELS)
        if size not in (None, frame.size):
            raise InvalidRequestError("video: all frames must have the same size", "video")
        size = frame.size
        yield frame, rate


def _video(data: bytes, limits: RequestLimits) -> Frames:
    """The size of each frame is checked before its pixels are converted."""
    with av.open(io.BytesIO(data), "r", format=container_of(data)) as file:
        [stream, *_] = file.streams.video
        if stream.codec_context is None or stream.codec_context.name not in CODECS:
            raise InvalidRequestError(f"video: the codec must be one of {', '.join(CODECS)}", "video")
        stream.codec_context.thread_count = 1  # a video of a caller does not take the machine
        shape = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
        _check_pixels(stream.codec_context.width, stream.codec_context.height, limits)
        rate = float(stream.average_rate) if stream.average_rate else None
        for frame in file.decode(stream):
            size = _square(frame.width, frame.height, shape)
            _check_pixels(max(size[0], frame.width), max(size[1], frame.height), limits)
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            if size != picture.size:
                picture = picture.resize(size, Image.Resampling.LANCZOS)
            turn = _turn(frame)
            yield picture if turn is None else picture.transpose(turn), rate


def _square(width: int, height: int, shape: Fraction) -> tuple[int, int]:
    """The size with square pixels, where one pixel is `shape` times as wide as high: no side becomes shorter."""
    if shape <= 0 or shape == 1:
        return width, height
    return (round(width * shape), height) if shape > 1 else (width, round(height / shape))


def _turn(frame: av.VideoFrame) -> Image.Transpose | None:
    """How the frame is turned before it is shown. Raises InvalidRequestError for angles between the right ones."""
    side_data: Any = frame.side_data  # typed as if its keys were text
    matrix = side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    least = max(map(abs, (a, b, c, d))) // 100
    signs = tuple(0 if abs(value) <= least else (1 if value > 0 else -1) for value in (a, b, c, d))
    if signs not in TURNS:
        raise InvalidRequestError("video: it is turned by an angle that is no multiple of 90 degrees", "video")
    return TURNS[signs]


def _animation(data: bytes, limits: RequestLimits) -> Frames:
    with opened_picture(data, "video", limits.max_input_pixels) as animation:
        total_ms = 0
        for number, frame in enumerate(ImageSequence.Iterator(animation), 1):
            frame.load()
            total_ms += int(frame.info.get("duration", 0))
            yield laid_on_white(frame), 1000 * number / total_ms if total_ms else None


def _check_pixels(width: int, height: int, limits: RequestLimits) -> None:
    if width * height > limits.max_input_pixels:
        raise _above("pixels (width x height)", limits.max_input_pixels)


def _above(unit: str, limit: int) -> InvalidRequestError:
    return InvalidRequestError(f"video: at most {limit} {unit}", "video", "limit_exceeded")


def _png(picture: Image.Image) -> InputImage:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=PNG_COMPRESSION)
    return InputImage(file.getvalue())
