"""Opens files that callers send as pictures, within bounds: none makes its reader work for long to be refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageOps

from deployments.errors import InvalidRequestError
from deployments.messages import PICTURE_FILE, PICTURE_FORMATS

pillow_heif.register_heif_opener(thumbnails=False)
pillow_heif.options.DECODE_THREADS = 1  # a picture of a caller does not take the machine

# Readings of a file: millions of tiny parts would take minutes, and Pillow joins some of them in quadratic time.
MAX_HEADER_READS = 5_000
MAX_READS = 200_000
SIXTEEN_BITS = 257  # 65 535 / 255


@dataclass(frozen=True)
class PictureHeader:
    """What the beginning of a file says of its picture; `width` and `height` are those of it upright."""

    width: int
    height: int
    has_alpha: bool


class _BoundedReads(io.BytesIO):
    """Raises ValueError at a reading too many."""

    reads_left = MAX_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError("the file has too many parts")
        return super().read(size)


def read_header(data: bytes, param: str, max_pixels: int) -> PictureHeader:
    """No pixel is unpacked. Raises InvalidRequestError, naming `param`, as `opened_picture` does."""
    with opened_picture(data, param, max_pixels) as picture:
        width, height = picture.size
        if _is_on_its_side(picture):
            width, height = height, width
        return PictureHeader(width, height, picture.has_transparency_data)


@contextmanager
def opened_picture(data: bytes, param: str, max_pixels: int) -> Iterator[Image.Image]:
    """The file's first picture, unpacked at its first use.

    Raises InvalidRequestError, naming `param`, also for what is raised inside: for what is no complete file of
    PICTURE_FORMATS, and for more than `max_pixels` (width x height), before any pixel is unpacked.
    """
    file = _BoundedReads(data)
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise _too_large(param, f"{width}x{height}", max_pixels)
            file.reads_left = MAX_READS
            yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(param, "far more", max_pixels) from error
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, struct.error) as error:
        # What Pillow raises for a broken file: each of its readers has its own.
        raise InvalidRequestError(
            f"{param} must be {PICTURE_FILE}, complete and of 8 or 16 bits per channel; it cannot be read as one", param
        ) from error


def upright(picture: Image.Image) -> Image.Image:
    """The whole picture, of eight bits, as its EXIF turns it. Raises ValueError for depths whose white is not known."""
    picture.load()
    return _eight_bits(ImageOps.exif_transpose(picture))


def laid_on_white(picture: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow cuts what is above 255 off."""
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"32 bits per channel ({picture.mode})")
    return picture


def _is_on_its_side(picture: Image.Image) -> bool:
    """Whether its EXIF says to turn it by 90 degrees, and Pillow has not already counted that in."""
    if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
        return False  # a PNG would be unpacked in search of it
    return picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _too_large(param: str, size: str, max_pixels: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}: at most {max_pixels} pixels (width x height), it has {size}", param, "limit_exceeded"
    )
