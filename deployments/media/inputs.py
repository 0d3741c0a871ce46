"""Pictures that callers send, as pipelines take them: the first frame, upright, of eight bits, in RGB or RGBA."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pillow_heif
from PIL import Image, ImageChops, ImageOps

from deployments.errors import InvalidRequestError
from deployments.messages import PICTURE_FILE, PICTURE_FORMATS, InputImage

pillow_heif.register_heif_opener(thumbnails=False)
pillow_heif.options.DECODE_THREADS = 1  # a picture of a caller does not take the machine

OPAQUE = 255
SIXTEEN_BITS = 257  # 65 535 / 255


def decode_input_image(
    image: InputImage, max_pixels: int, param: str = "image", keep_alpha: bool = False
) -> Image.Image:
    """The caller's picture, RGB as diffusers.utils.load_image gives it, what is transparent laid on white.

    With `keep_alpha` it is RGBA. Raises InvalidRequestError, naming `param`, for what is no complete file of
    PICTURE_FORMATS, and for more than `max_pixels` (width x height), before any pixel is unpacked.
    """
    with _refusing(max_pixels, param):
        picture = _upright(image, max_pixels, param)
        if keep_alpha:
            return picture.convert("RGBA")
        return _on_white(picture) if picture.has_transparency_data else picture.convert("RGB")


def decode_mask(
    image: InputImage, max_pixels: int, param: str = "mask_image", by_alpha: bool = False
) -> Image.Image:
    """The caller's mask in diffusers' meaning: RGB, white where a picture is to be repainted.

    OpenAI's masks are transparent there. Unless `by_alpha`, a mask without alpha, or a grey one that is opaque
    everywhere, has diffusers' meaning. Raises InvalidRequestError like `decode_input_image`, and for a mask that is
    transparent nowhere and not grey.
    """
    with _refusing(max_pixels, param):
        picture = _upright(image, max_pixels, param)
        if not picture.has_transparency_data and not by_alpha:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    least, _ = alpha.getextrema()
    if least == 0:
        return alpha.point([OPAQUE] + [0] * OPAQUE).convert("RGB")
    if least == OPAQUE and _is_grey(picture) and not by_alpha:
        return picture.convert("RGB")
    raise InvalidRequestError(
        f"{param}: no pixel of it is transparent (alpha 0), so nothing would be repainted; "
        "a mask without alpha is white where to repaint",
        param,
    )


def _upright(image: InputImage, max_pixels: int, param: str) -> Image.Image:
    picture: Image.Image = Image.open(io.BytesIO(image.data), formats=PICTURE_FORMATS)
    width, height = picture.size
    if width * height > max_pixels:
        raise _too_many_pixels(f"{width}x{height}", max_pixels, param)
    picture.load()
    return _eight_bits(ImageOps.exif_transpose(picture))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow cuts what is above 255 off. Raises ValueError for depths whose white is not known."""
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.uint32)
        return Image.fromarray(((values + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"32 bits per channel ({picture.mode})")
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _is_grey(picture: Image.Image) -> bool:
    red, green, blue, _ = picture.split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


@contextmanager
def _refusing(max_pixels: int, param: str) -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels("larger still", max_pixels, param) from error
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, struct.error) as error:
        # What Pillow raises for a broken file: each of its readers has its own.
        raise InvalidRequestError(
            f"{param} must be {PICTURE_FILE}, complete and of 8 or 16 bits per channel; it cannot be read as one", param
        ) from error


def _too_many_pixels(size: str, max_pixels: int, param: str) -> InvalidRequestError:
    message = f"{param} may have at most {max_pixels} pixels (width x height), it is {size}"
    return InvalidRequestError(message, param)
