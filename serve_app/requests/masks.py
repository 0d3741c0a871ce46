"""The mask of an inpainting: which one it is, and whether it fits the picture."""

from __future__ import annotations

from deployments.errors import InvalidRequestError
from deployments.messages import InputImage, StageDescription
from serve_app.requests.bodies import GenerationBody
from serve_app.requests.input_pictures import Body, check_picture
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
        size = check_picture(mask.data, field, limits)
        if (size.width, size.height) != (header.width, header.height):
            raise InvalidRequestError(
                f"{field}: must have the size of the (first) picture, {header.width}x{header.height}, "
                f"it has {size.width}x{size.height}",
                field,
            )
    return body


def mask_field(body: GenerationBody) -> str:
    """The name by which callers of this body know it."""
    alias = type(body).model_fields["mask_image"].validation_alias
    return "mask_image" if alias is None else "mask"


def _first(pictures: object) -> InputImage | None:
    picture = pictures[0] if isinstance(pictures, list) and pictures else pictures
    return picture if isinstance(picture, InputImage) else None
