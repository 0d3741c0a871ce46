"""Pictures that callers send, as pipelines take them: the first frame, upright, of eight bits, in RGB or RGBA."""

from __future__ import annotations

from PIL import Image, ImageChops

from deployments.errors import InvalidRequestError
from deployments.media.opening import laid_on_white, opened_picture, upright
from deployments.messages import InputImage

OPAQUE = 255


def decode_input_image(
    image: InputImage, max_pixels: int, param: str = "image", keep_alpha: bool = False
) -> Image.Image:
    """The caller's picture, RGB as diffusers.utils.load_image gives it, what is transparent laid on white.

    With `keep_alpha` it is RGBA. Raises InvalidRequestError, naming `param`, for what is no complete file of
    PICTURE_FORMATS, and for more than `max_pixels` (width x height), before any pixel is unpacked.
    """
    with opened_picture(image.data, param, max_pixels) as opened:
        picture = upright(opened)
        return picture.convert("RGBA") if keep_alpha else laid_on_white(picture)


def decode_mask(image: InputImage, max_pixels: int, param: str = "mask_image", by_alpha: bool = False) -> Image.Image:
    """The caller's mask in diffusers' meaning: RGB, white where a picture is to be repainted.

    OpenAI's masks are transparent there. Unless `by_alpha`, a mask without alpha, or a grey one that is opaque
    everywhere, has diffusers' meaning. Raises InvalidRequestError like `decode_input_image`, and for a mask that is
    transparent nowhere and not grey.
    """
    with opened_picture(image.data, param, max_pixels) as opened:
        picture = upright(opened)
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


def _is_grey(picture: Image.Image) -> bool:
    red, green, blue, _ = picture.split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))
