"""Small pictures of what is made: a video's first frame, a sheet of its frames, and previews for a job's events."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import av
from PIL import Image, ImageSequence

SHEET_COLUMNS, SHEET_ROWS = 4, 4
SHEET_FRAME_WIDTH = 160  # pixels
WEBP_QUALITY = 80
SHEET_QUALITY = 85
PREVIEW_LONGEST_SIDE = 256  # pixels
PREVIEW_QUALITY = 75


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
    return _encoded(sheet, "JPEG", SHEET_QUALITY), "image/jpeg"


def small_picture(data: bytes) -> dict[str, Any]:
    """A picture file as a JPEG of at most PREVIEW_LONGEST_SIDE pixels, in the words of an event."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    picture.thumbnail((PREVIEW_LONGEST_SIDE, PREVIEW_LONGEST_SIDE))
    return {
        "b64_json": base64.b64encode(_encoded(picture, "JPEG", PREVIEW_QUALITY)).decode(),
        "output_format": "jpeg",
        "size": f"{picture.width}x{picture.height}",
    }


def _frames(video: bytes) -> Iterator[Image.Image]:
    if video.startswith((b"GIF8", b"RIFF")):
        with Image.open(io.BytesIO(video), formats=("GIF", "WEBP")) as animation:
            yield from (frame.convert("RGB") for frame in ImageSequence.Iterator(animation))
        return
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
