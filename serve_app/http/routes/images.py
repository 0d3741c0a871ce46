"""OpenAI's images API: POST /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import GenerationRequest, StageDescription
from serve_app.http.answers import ImagesAnswer, OutputURLs, items_of_media
from serve_app.http.asked import check_how_asked, how_asked
from serve_app.http.by_job import answer_by_job
from serve_app.http.context import Context, RequestContext
from serve_app.http.openapi import EVENT_STREAM
from serve_app.http.reading import openapi_content, read_body
from serve_app.http.streaming import PartialPictureFollower, PartialPictures, StreamPrefix, picture_events
from serve_app.jobs.service import new_job_id
from serve_app.requests.bodies import ImageGenerationBody
from serve_app.requests.edit_bodies import ImageEditBody
from serve_app.service import Service
from serve_app.storage.outputs import store_media

AT_ONCE_OR_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The pictures; with `stream: true` as server-sent events.", "content": EVENT_STREAM}
}


def image_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/images/generations", response_model=ImagesAnswer, responses=AT_ONCE_OR_STREAMED)
    async def create_images(request: Request, body: ImageGenerationBody, context: Context) -> ImagesAnswer | Response:
        """Pictures from a prompt, made by as many parallel generations as `n` says."""
        check_generation(body, await service.model.describe())
        return await answer_images(service, context, request, body, "image_generation")

    @router.post(
        "/v1/images/edits",
        response_model=ImagesAnswer,
        responses=AT_ONCE_OR_STREAMED,
        openapi_extra=openapi_content(ImageEditBody, files=("image", "mask")),
    )
    async def edit_images(request: Request, context: Context) -> ImagesAnswer | Response:
        """Pictures from pictures and a prompt; `mask` where the model takes one."""
        body = await read_body(request, ImageEditBody)
        check_edit(body, await service.model.describe())
        return await answer_images(service, context, request, body, "image_edit")

    return router


async def answer_images(
    service: Service, context: RequestContext, request: Request, body: ImageGenerationBody, prefix: StreamPrefix
) -> ImagesAnswer | Response:
    """The answer to generations and edits: by a job, with `stream` as events, or at once."""
    asked = how_asked(request.headers, body)
    check_how_asked(asked, body)
    job_id = new_job_id("image") if asked.wants_job else None
    requests = await service.parse(body, job_id)
    if job_id is not None:
        return await answer_by_job(service, context, asked, prefix, body, job_id, requests)
    if asked.is_streamed:
        return await stream_images(service, context, requests, body.partial_images or 0, prefix)
    media = await service.at_once.all(requests, context.caller)
    context.count_compute(media)
    urls = OutputURLs(service.storage, context.route_prefix)
    return ImagesAnswer.of(await items_of_media(body.response_format, requests, media, urls), requests, media)


async def stream_images(
    service: Service, context: RequestContext, requests: list[GenerationRequest], previews: int, prefix: StreamPrefix
) -> Response:
    """Each picture as an event when it is made, and `previews` of each on its way."""
    partials = PartialPictures()
    followers = [PartialPictureFollower(partials, each, previews) for each in requests]
    store = partial(store_media, service.storage) if service.storage.is_shared else None
    tasks = await service.at_once.start(requests, context.caller, followers, then=store)
    return StreamingResponse(picture_events(prefix, tasks, partials), media_type="text/event-stream")


def check_edit(body: ImageEditBody, description: StageDescription) -> None:
    """Raises InvalidRequestError or NotSupportedError that names the field as callers know it."""
    if body.image is None:
        raise InvalidRequestError("image is required: the picture to edit", "image", "missing_required_parameter")
    if not description.takes("image"):
        raise NotSupportedError(
            f"{description.pipeline_class} makes pictures from a prompt alone, it cannot edit one: "
            "use /v1/images/generations",
            "image",
        )
    if body.mask_image is not None and not description.takes("mask_image"):
        body.refuse(NotSupportedError(f"mask is not supported: {description.pipeline_class} does not take one", "mask"))
    if isinstance(body.mask_image, list):
        raise InvalidRequestError("mask must be one picture", "mask")


def check_generation(body: ImageGenerationBody, description: StageDescription) -> None:
    """Raises InvalidRequestError where the model cannot begin without a picture."""
    if description.media_kind == "image" and description.needs_picture and body.image is None:
        raise InvalidRequestError(
            f"{description.pipeline_class} edits pictures: send one to POST /v1/images/edits",
            "image",
            "missing_required_parameter",
        )
