"""What belongs on the first picture: the mask of an inpainting, or OpenAI's markup that guides an edit."""

from __future__ import annotations

import asyncio
import io

from PIL import Image

from deployments.errors import InvalidRequestError
from deployments.media.opening import PictureHeader, laid_on_white, opened_picture, upright
from deployments.messages import InputImage, StageDescription
from serve_app.requests.bodies import GenerationBody
from serve_app.requests.given.pictures import Body
from serve_app.requests.input_pictures import check_picture
from serve_app.requests.limits import RequestLimits


def with_mask(body: Body, description: StageDescription, limits: RequestLimits) -> Body:
    """The body, its pictures at hand, with the mask that the model is to use.

    As OpenAI has it, a mask is of the size of the first picture, and without one the transparent part of the
    picture itself is repainted. Raises InvalidRequestError that names the mask's field.
    """
    picture = _first(getattr(body, "image", None))
    if picture is None or not description.takes("mask_image"):
        return body
    header = check_picture(picture.data, "image", limits)
    field = mask_field(body)
    if body.mask_image is None:
        if not header.has_alpha:
            raise InvalidRequestError(
                f"{field} is required by {description.pipeline_class}, "
                "or a picture that is transparent where it is to be repainted",
                field,
                "missing_required_parameter",
            )
        return body.model_copy(update={"mask_image": picture})
    for mask in body.mask_image if isinstance(body.mask_image, list) else [body.mask_image]:
        assert isinstance(mask, InputImage)
        _check_size(check_picture(mask.data, field, limits), header, field)
    return body


async def with_markup(body: Body, limits: RequestLimits) -> Body:
    """The body, its pictures at hand, with the markup laid over the first of them.

    Raises InvalidRequestError, naming `markup`, for one of another size or without transparency, and beside a mask.
    """
    markup = getattr(body, "markup", None)
    if markup is None:
        return body
    pictures = getattr(body, "image", None)
    picture = _first(pictures)
    if not isinstance(markup, InputImage) or picture is None:
        raise InvalidRequestError("markup must be one picture, beside the image that it is laid over", "markup")
    if body.mask_image is not None:
        raise InvalidRequestError("markup is not supported together with a mask", "markup")
    header = check_picture(markup.data, "markup", limits)
    _check_size(header, check_picture(picture.data, "image", limits), "markup")
    if not header.has_alpha:
        raise InvalidRequestError("markup must have transparent parts: it would hide the picture", "markup")
    marked = await asyncio.to_thread(_laid_over, markup, picture, limits.max_input_pixels)
    others = pictures[1:] if isinstance(pictures, list) else []
    return body.model_copy(update={"image": [marked, *others] if others else marked, "markup": None})


def _laid_over(markup: InputImage, picture: InputImage, max_pixels: int) -> InputImage:
    with opened_picture(picture.data, "image", max_pixels) as opened:
        below = laid_on_white(upright(opened)).convert("RGBA")
    with opened_picture(markup.data, "markup", max_pixels) as opened:
        above = upright(opened).convert("RGBA")
    file = io.BytesIO()
    Image.alpha_composite(below, above).convert("RGB").save(file, "PNG", compress_level=1)
    return InputImage(file.getvalue())


def _check_size(size: PictureHeader, first: PictureHeader, field: str) -> None:
    if (size.width, size.height) != (first.width, first.height):
        raise InvalidRequestError(
            f"{field}: must have the size of the (first) picture, {first.width}x{first.height}, "
            f"it has {size.width}x{size.height}",
            field,
        )


def mask_field(body: GenerationBody) -> str:
    """The name by which callers of this body know it."""
    alias = type(body).model_fields["mask_image"].validation_alias
    return "mask_image" if alias is None else "mask"


def _first(pictures: object) -> InputImage | None:
    picture = pictures[0] if isinstance(pictures, list) and pictures else pictures
    return picture if isinstance(picture, InputImage) else None
