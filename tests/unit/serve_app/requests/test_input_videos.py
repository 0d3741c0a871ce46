"""Videos of callers come out as a player shows them: upright, with square pixels, from every container."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from deployments.errors import InvalidRequestError
from serve_app.requests.input_videos import ReadVideo, read_video
from serve_app.requests.limits import RequestLimits

WIDTH, HEIGHT = 32, 16
Matrix = tuple[float, float, float, float]


def video(shape: tuple[int, int] = (1, 1), container: str = "mp4") -> bytes:
    """Three frames, black with a white upper left quarter; a pixel is `shape` times as wide as high."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(*shape)
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[: HEIGHT // 2, : WIDTH // 2] = 255
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


def in_matroska(data: bytes) -> bytes:
    """The same stream in the container of WebM."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="matroska") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return file.getvalue()


def turned(data: bytes, matrix: Matrix) -> bytes:
    """The MP4 with this display matrix, in its track header (ISO/IEC 14496-12, 8.3.2)."""
    begin = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (int(value * 65536) for value in matrix)
    return data[:begin] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[begin + 36 :]


def bright_quarter(read: ReadVideo) -> str:
    picture = np.asarray(Image.open(io.BytesIO(read.frames[0].data)))[..., 0] > 128
    assert picture.shape == (read.height, read.width)
    assert picture.mean() == pytest.approx(0.25, abs=0.05)
    corners = {"upper left": (0, 0), "upper right": (0, -1), "lower left": (-1, 0), "lower right": (-1, -1)}
    [corner] = [name for name, place in corners.items() if picture[place]]
    return corner


@pytest.mark.parametrize(
    ("matrix", "corner", "is_upright"),
    [
        ((1, 0, 0, 1), "upper left", True),
        ((0, 1, -1, 0), "upper right", False),  # a phone held upright
        ((-1, 0, 0, -1), "lower right", True),
        ((0, -1, 1, 0), "lower left", False),
        ((-1, 0, 0, 1), "upper right", True),  # a mirror
        ((1, 0, 0, -1), "lower left", True),
        ((0, 1, 1, 0), "upper left", False),
        ((0, -1, -1, 0), "lower right", False),
    ],
)
@pytest.mark.parametrize("last_frame_only", [False, True])
def test_a_video_is_turned_as_its_display_matrix_says(matrix, corner, is_upright, last_frame_only):
    read = read_video(turned(video(), matrix), RequestLimits(), last_frame_only)
    assert (read.width, read.height) == ((WIDTH, HEIGHT) if is_upright else (HEIGHT, WIDTH))
    assert bright_quarter(read) == corner
    assert (len(read.frames), read.fps) == (1 if last_frame_only else 3, 8.0)


def test_an_angle_between_the_right_ones_is_refused():
    with pytest.raises(InvalidRequestError, match="multiple of 90") as caught:
        read_video(turned(video(), (0.7, 0.7, -0.7, 0.7)), RequestLimits())
    assert caught.value.param == "video"


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize(("shape", "size"), [((2, 1), (64, 16)), ((1, 2), (32, 32)), ((4, 3), (43, 16))])
def test_pixels_that_are_not_square_become_square(container, shape, size):
    data = in_matroska(video(shape)) if container == "matroska" else video(shape, container)
    read = read_video(data, RequestLimits())
    assert (read.width, read.height) == size
    assert bright_quarter(read) == "upper left"


def test_the_pixels_are_made_square_before_the_video_is_turned():
    read = read_video(turned(video((2, 1)), (0, 1, -1, 0)), RequestLimits())
    assert (read.width, read.height) == (16, 64)


def test_what_square_pixels_make_too_large_is_refused():
    with pytest.raises(InvalidRequestError, match="at most 1000 pixels"):
        read_video(video((2, 1)), RequestLimits(max_input_pixels=1000))


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_moving_pictures_are_videos_too(format):
    levels = (0, 60, 120, 180)
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (level, level, level)) for level in levels]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=200, loop=0)
    read = read_video(file.getvalue(), RequestLimits())
    assert (read.width, read.height, read.fps) == (WIDTH, HEIGHT, 5.0)
    seen = [np.asarray(Image.open(io.BytesIO(frame.data))).mean() for frame in read.frames]
    assert np.abs(np.array(seen) - levels).max() < 4
    with pytest.raises(InvalidRequestError, match="at most 3 frames"):
        read_video(file.getvalue(), RequestLimits(max_frames=3))
    with pytest.raises(InvalidRequestError, match="complete"):
        read_video(file.getvalue()[:40], RequestLimits())
