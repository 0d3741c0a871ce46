"""Pictures of a video: its first frame, and a sheet of frames from beginning to end."""

from __future__ import annotations

import io
from collections.abc import Iterator

import av
from PIL import Image

SHEET_COLUMNS, SHEET_ROWS = 4, 4
SHEET_FRAME_WIDTH = 160  # pixels
WEBP_QUALITY = 80
JPEG_QUALITY = 85


def thumbnail(video: bytes) -> tuple[bytes, str]:
    """The first frame as a WebP file; and its content type."""
    return _encoded(next(_frames(video)), "WEBP", WEBP_QUALITY), "image/webp"


def spritesheet(video: bytes) -> tuple[bytes, str]:
    """Up to SHEET_COLUMNS x SHEET_ROWS frames, evenly spread, in reading order, as a JPEG file."""
    count = sum(1 for _ in _frames(video))
    num_shown = min(count, SHEET_COLUMNS * SHEET_ROWS)
    shown = {index * count // num_shown for index in range(num_shown)}
    pictures = [_small(frame) for index, frame in enumerate(_frames(video)) if index in shown]
    columns = min(SHEET_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, rows * height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return _encoded(sheet, "JPEG", JPEG_QUALITY), "image/jpeg"


def _frames(video: bytes) -> Iterator[Image.Image]:
    with av.open(io.BytesIO(video), "r") as file:
        for frame in file.decode(file.streams.video[0]):
            yield Image.fromarray(frame.to_ndarray(format="rgb24"))


def _small(picture: Image.Image) -> Image.Image:
    height = max(1, round(picture.height * SHEET_FRAME_WIDTH / picture.width))
    return picture.resize((SHEET_FRAME_WIDTH, height))


def _encoded(picture: Image.Image, format: str, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, quality=quality)
    return file.getvalue()
