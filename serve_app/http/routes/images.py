"""The route of image edits, POST /v1/images/edits, and what pipelines that start from a picture need."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, Field
from ray import serve

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import MediaKind, StageDescription
from serve_app.http.errors import ServeErrorRoute
from serve_app.http.openapi import EVENT_STREAM
from serve_app.http.reading import openapi_content, read_body
from serve_app.requests.bodies import ImageGenerationBody, ImagesAnswer, InputImages

# How diffusers names pipelines that cannot do without a picture although the parameter has a default.
STARTS_FROM_A_PICTURE = re.compile(r"Img2Img|Inpaint|Edit|Pix2Pix|Upscale|Image2Image|Variation|ControlNet")

AT_ONCE_OR_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The pictures; with `stream: true` as server-sent events.", "content": EVENT_STREAM}
}


class ImageEditBody(ImageGenerationBody):
    """The body of POST /v1/images/edits: that of generations, with pictures."""

    media_kind: ClassVar[MediaKind] = "image"

    image: InputImages = Field(
        None,
        validation_alias=AliasChoices("image", "images"),
        description="the pictures to edit: uploads (`image` or `image[]`), data URLs or base64",
    )
    mask_image: InputImages = Field(
        None,
        validation_alias=AliasChoices("mask", "mask_image"),
        description="white where `image` is to be repainted; refused by models that take no mask",
    )
    input_fidelity: str | None = Field(None, description="low: the model decides how close it stays to `image`")


router = APIRouter(route_class=ServeErrorRoute)


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    responses=AT_ONCE_OR_STREAMED,
    openapi_extra=openapi_content(ImageEditBody, files=("image", "mask")),
)
async def edit_images(request: Request) -> Response | ImagesAnswer:
    """Pictures from pictures and a prompt; `mask` where the model takes one."""
    body = await read_body(request, ImageEditBody)
    ingress: Any = serve.get_replica_context().servable_object
    check_edit(body, await ingress.describe())
    answer: Response | ImagesAnswer = await ingress.answer_images(request, body, "image_edit")
    return answer


def check_edit(body: ImageEditBody, description: StageDescription) -> None:
    """Raises InvalidRequestError or NotSupportedError that names the field as callers know it."""
    takes = {*description.parameters, *description.required}
    if body.image is None:
        raise InvalidRequestError("image is required: the picture to edit", "image", "missing_required_parameter")
    if "image" not in takes:
        raise NotSupportedError(
            f"{description.pipeline_class} makes pictures from a prompt alone, it cannot edit one: "
            "use /v1/images/generations",
            "image",
        )
    if body.mask_image is not None and "mask_image" not in takes:
        raise NotSupportedError(f"mask is not supported: {description.pipeline_class} does not take one", "mask")
    if isinstance(body.mask_image, list):
        raise InvalidRequestError("mask must be one picture", "mask")
    if body.input_fidelity not in (None, "low"):
        raise NotSupportedError("input_fidelity is not supported, only 'low'", "input_fidelity")


def check_generation(body: ImageGenerationBody, description: StageDescription) -> None:
    """Raises InvalidRequestError where the model cannot begin without a picture."""
    needs_picture = "image" in description.required or (
        "image" in description.parameters and STARTS_FROM_A_PICTURE.search(description.pipeline_class)
    )
    if body.media_kind == "image" and body.image is None and needs_picture:
        raise InvalidRequestError(
            f"{description.pipeline_class} edits pictures: send one to POST /v1/images/edits",
            "image",
            "missing_required_parameter",
        )
