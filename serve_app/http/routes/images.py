"""OpenAI's images API: POST /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import GenerationRequest, StageDescription
from serve_app.http.answers import Answer, ImagesAnswer, answer_of, items_of_media
from serve_app.http.asked import ASKING_HEADERS, HowAsked, check_how_asked, how_asked
from serve_app.http.by_job import ChooseModel, answer_by_job, job_of_body, model_for
from serve_app.http.context import Context, RequestContext
from serve_app.http.openapi import EVENT_STREAM, JOB_ACCEPTED
from serve_app.http.reading import openapi_content, read_body
from serve_app.http.streaming import (
    PartialPictureFollower,
    PartialPictures,
    StreamPrefix,
    event_stream,
    picture_events,
    picture_events_of_job,
)
from serve_app.models.service import ModelService
from serve_app.requests.bodies import ImageGenerationBody
from serve_app.requests.edit_bodies import ImageEditBody
from serve_app.requests.given.own_arguments import is_edit_of_pictures, takes_mask
from serve_app.requests.outputs import check_kind
from serve_app.service import Service
from serve_app.storage.outputs import OutputURLs, store_media

AT_ONCE_OR_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The pictures; with `stream: true` as server-sent events.", "content": EVENT_STREAM},
    202: JOB_ACCEPTED,
}


def image_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/images/generations",
        response_model=ImagesAnswer,
        responses=AT_ONCE_OR_STREAMED,
        openapi_extra=ASKING_HEADERS | openapi_content(ImageGenerationBody, files=("image", "mask_image")),
    )
    async def create_images(request: Request, context: Context) -> Answer | Response:
        """Pictures from a prompt, made by as many parallel generations as `n` says."""
        body = await read_body(request, ImageGenerationBody)

        async def choose() -> ModelService:
            model = await model_for(service, context, body)
            check_generation(body, await model.describe())
            return model

        return await answer_images(service, context, request, body, "image_generation", choose)

    @router.post(
        "/v1/images/edits",
        response_model=ImagesAnswer,
        responses=AT_ONCE_OR_STREAMED,
        openapi_extra=ASKING_HEADERS | openapi_content(ImageEditBody, files=("image", "mask", "markup")),
    )
    async def edit_images(request: Request, context: Context) -> Answer | Response:
        """Pictures from pictures and a prompt; `mask` where the model takes one."""
        body = await read_body(request, ImageEditBody)

        async def choose() -> ModelService:
            model = await model_for(service, context, body)
            check_edit(body, await model.describe())
            return model

        return await answer_images(service, context, request, body, "image_edit", choose)

    return router


async def answer_images(
    service: Service,
    context: RequestContext,
    request: Request,
    body: ImageGenerationBody,
    prefix: StreamPrefix,
    choose: ChooseModel,
) -> Answer | Response:
    """The answer to generations and edits: by a job, with `stream` as events, or at once."""
    asked = how_asked(request.headers, body)
    check_how_asked(asked, body)
    if asked.wants_job and asked.is_streamed:
        job = await job_of_body(service, context, asked, prefix, body, choose)
        return event_stream(picture_events_of_job(prefix, service.jobs, service.storage, job))
    if asked.wants_job:
        return await answer_by_job(service, context, asked, prefix, body, choose)
    model = await choose()
    requests = await model.parse(body, context.caller, limits=asked.limits)
    if asked.is_streamed:
        return await stream_images(service, context, model, asked, requests, body, prefix)
    media = await model.at_once.all(requests, context.caller, asked.limits)
    context.count_compute(media)
    urls = OutputURLs(service.storage, context.base_url)
    items = await items_of_media(body.response_format, requests, media, urls)
    return answer_of(body.media_kind, items, requests, media, body.end_user)


async def stream_images(
    service: Service,
    context: RequestContext,
    model: ModelService,
    asked: HowAsked,
    requests: list[GenerationRequest],
    body: ImageGenerationBody,
    prefix: StreamPrefix,
) -> Response:
    """Each picture as an event when it is made, and `partial_images` of each on its way."""
    partials = PartialPictures()
    followers = [PartialPictureFollower(partials, each, body.partial_images or 0) for each in requests]
    store = partial(store_media, service.storage) if service.storage.is_shared else None
    tasks = await model.at_once.start(requests, context.caller, followers, store, asked.limits)
    return event_stream(picture_events(prefix, tasks, partials, end_user=body.end_user))


def check_edit(body: ImageEditBody, description: StageDescription) -> None:
    """Raises InvalidRequestError or NotSupportedError that names the field as callers know it."""
    check_kind("image", description)
    if body.image is None:
        raise InvalidRequestError("image is required: the picture to edit", "image", "missing_required_parameter")
    if not is_edit_of_pictures(description):
        raise NotSupportedError(
            f"{description.pipeline_class} makes pictures from a prompt alone, it cannot edit one: "
            "use /v1/images/generations",
            "image",
        )
    if body.mask_image is not None and not takes_mask(description):
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
