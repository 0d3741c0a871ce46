"""The pictures of a body's own fields: those given by reference are fetched, and the sizes of all are checked."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from deployments.errors import InvalidRequestError
from deployments.messages import InputImage
from serve_app.requests.bodies import IMAGE_SIGNATURES, NO_PICTURE, GenerationBody
from serve_app.requests.given.sources import FileSource
from serve_app.requests.input_pictures import check_picture

Body = TypeVar("Body", bound=GenerationBody)

PICTURE_FIELDS = ("image", "mask_image", "last_image", "markup")


async def with_pictures(body: Body, source: FileSource) -> Body:
    """The body with every picture of its fields at hand.

    Raises NotSupportedError where files are not fetched, InvalidRequestError for what cannot be fetched or has too
    many pixels; `param` is the field.
    """
    changes = {}
    for field in PICTURE_FIELDS:
        if (value := getattr(body, field, None)) is not None:
            _check_number(field, _num_pictures(value), source.rules.limits.max_input_images)
            changes[field] = await _read(value, field, source)
    return body.model_copy(update=changes)


def _num_pictures(value: Any) -> int:
    """In all lists together."""
    return sum(map(_num_pictures, value)) if isinstance(value, list) else 1


def _check_number(field: str, number: int, limit: int) -> None:
    if number > limit:
        raise InvalidRequestError(f"{field}: at most {limit} pictures, got {number}", field, "limit_exceeded")


async def _read(value: Any, field: str, source: FileSource) -> Any:
    """Lists may lie in lists, and have null in them."""
    if isinstance(value, list):
        return list(await asyncio.gather(*(_read(each, field, source) for each in value)))
    if value is None:
        return None
    picture = value
    if not isinstance(value, InputImage):
        data = await source.bytes_of(value, field)
        if not IMAGE_SIGNATURES.match(data):
            raise InvalidRequestError(f"{field}: {NO_PICTURE}", field)
        picture = InputImage(data)
    check_picture(picture.data, field, source.rules.limits)
    return picture
