"""OpenAI's videos API: every video is a job (serve_app.jobs); and POST /v1/videos/generations, which waits for it."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from deployments.errors import InvalidRequestError, ModelNotFoundError, NotSupportedError
from deployments.messages import GenerationRequest
from serve_app.errors import JobNotFoundError
from serve_app.http.answers import (
    Answer,
    DeletedVideo,
    VideoObject,
    VideoObjects,
    VideosAnswer,
    poll_after_ms,
    shown_of_video,
    video_object,
)
from serve_app.http.asked import (
    ASKING_HEADERS,
    WAITING_HEADER,
    HowAsked,
    how_asked,
    idempotency_key,
)
from serve_app.http.by_job import ChooseModel, answer_generation, model_for, video_job
from serve_app.http.byte_ranges import file_answer
from serve_app.http.context import Context, RequestContext
from serve_app.http.openapi import FILE_ANSWERS, JOB_ACCEPTED
from serve_app.http.reading import JSONRoute, openapi_content, read_body
from serve_app.http.routes.jobs import Limit, Order
from serve_app.jobs.records import Job
from serve_app.jobs.service import new_job_id
from serve_app.models.service import ModelService
from serve_app.requests.argument_values import above, check_text
from serve_app.requests.bodies import VideoGenerationBody
from serve_app.requests.edit_bodies import VideoRemixBody
from serve_app.service import Service
from serve_app.storage.outputs import OutputURLs
from serve_app.storage.previews import spritesheet, thumbnail

# What the model is to make, once it is read, and the id of the video that it comes from.
ReadSource = Callable[[ModelService], Awaitable[tuple[VideoGenerationBody, str | None]]]
Variant = Literal["video", "thumbnail", "spritesheet"]
PREVIEWS = {"thumbnail": thumbnail, "spritesheet": spritesheet}
POLL_HEADER = "openai-poll-after-ms"  # the client waits so long before it asks again


def video_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JSONRoute)

    @router.post(
        "/v1/videos/generations",
        response_model=VideosAnswer,
        responses={202: JOB_ACCEPTED},
        openapi_extra=ASKING_HEADERS | openapi_content(VideoGenerationBody, files=("image", "last_image")),
    )
    async def create_videos(request: Request, context: Context) -> Answer | Response:
        """A video from a prompt; the answer comes when it is made."""
        return await answer_generation(service, context, request, await read_body(request, VideoGenerationBody))

    @router.post(
        "/v1/videos",
        openapi_extra=ASKING_HEADERS | openapi_content(VideoGenerationBody, files=("image", "last_image")),
    )
    async def create_video(request: Request, response: Response, context: Context) -> VideoObject:
        """A video as a job; it is stored before this is answered, and survives the end of any process."""
        body = await read_body(request, VideoGenerationBody)

        async def source(_: ModelService) -> tuple[VideoGenerationBody, str | None]:
            return body, None

        async def choose() -> ModelService:
            return await model_for(service, context, body)

        return await answer_with_job(service, context, request, response, body, source, choose)

    @router.get("/v1/videos")
    async def list_videos(
        context: Context, after: str | None = None, limit: Limit = 20, order: Order = "desc"
    ) -> VideoObjects:
        """The caller's videos, by the time they were asked for."""
        page, has_more = await service.jobs.page(context.caller, "video", after, limit, order)
        urls = OutputURLs(service.storage, context.base_url)
        data = [video_object(job, urls) for job in page]
        return VideoObjects(
            data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more
        )

    @router.get("/v1/videos/{video_id}", openapi_extra=WAITING_HEADER)
    async def read_video(request: Request, video_id: str, response: Response, context: Context) -> VideoObject:
        """A video as it stands; with `Prefer: wait=n` when it has ended, or after n seconds."""
        job = await video_job(service, context, video_id)
        return await _answer(service, context, how_asked(request.headers), job, response)

    @router.delete("/v1/videos/{video_id}")
    async def delete_video(video_id: str, context: Context) -> DeletedVideo:
        """Stop it if it is being made, and remove it and its files."""
        await video_job(service, context, video_id)
        job = await service.jobs.delete(video_id, context.caller)
        return DeletedVideo(id=job.id)

    @router.get(
        "/v1/videos/{video_id}/content",
        response_class=Response,
        responses=FILE_ANSWERS
        | {200: {"content": {"video/mp4": {}, "image/webp": {}, "image/gif": {}, "image/jpeg": {}}}},
    )
    async def read_content(
        request: Request,
        video_id: str,
        context: Context,
        variant: Variant = "video",
        index: Annotated[int, Query(ge=0, le=10_000)] = 0,
    ) -> Response:
        """The file, its first frame, or a sheet of its frames; `index` counts from 0 where `n` was above 1."""
        job = await video_job(service, context, video_id)
        if job.status != "completed":
            message = f"the video {job.id!r} has no content: it is {job.status}"
            raise JobNotFoundError(message, "video_id", "video_not_ready")
        if index >= len(job.outputs):
            raise JobNotFoundError(f"index: the video {job.id!r} has {len(job.outputs)} files, from 0", "index")
        data, content_type = await service.storage.load(job.outputs[index].key)
        if variant != "video":
            data, content_type = await asyncio.to_thread(PREVIEWS[variant], data)
        name = f"{job.id}.{content_type.partition('/')[2]}"
        return file_answer(request.headers, data, content_type, name, job.completed_at or job.created_at)

    @router.post("/v1/videos/{video_id}/remix", openapi_extra=ASKING_HEADERS)
    async def remix_video(
        video_id: str, body: VideoRemixBody, request: Request, response: Response, context: Context
    ) -> VideoObject:
        """A new video with the parameters of another, its seed among them, and a new prompt."""
        how = how_asked(request.headers)
        key = idempotency_key(how, f"/v1/videos/{video_id}/remix", body)
        known = await service.jobs.job_of_key(context.caller, key)
        if known is not None:  # the original may be gone since
            return await _answer(service, context, how, known, response)
        original = await video_job(service, context, video_id)
        model = await model_to_remix(service, context, original)
        description = await model.describe()
        if description.media_kind != "video":
            before = f"{original.asked.model!r} did, which made {original.id!r}"
            raise ModelNotFoundError(f"no model here makes videos now, as {before}")
        if not description.takes("prompt"):
            raise NotSupportedError(f"{description.pipeline_class} does not take a prompt: it cannot remix", "prompt")
        check_text("prompt", body.prompt, model.limits)
        if not body.prompt.strip():
            raise InvalidRequestError("prompt must not be empty", "prompt", "missing_required_parameter")
        job_id = new_job_id("video")
        stored = await service.jobs.requests_of(original)
        if len(stored) > model.limits.max_images:
            raise above("n", len(stored), model.limits.max_images, " videos, as the original has")
        requests = [
            await model.renewed(_remixed(each, model.name, body.prompt, job_id, number))
            for number, each in enumerate(stored)
        ]
        shown = shown_of_video(requests[0], description) | {
            "remixed_from_video_id": original.id,
            "base_url": context.base_url,
        }
        if "safety_identifier" in original.shown:
            shown["safety_identifier"] = original.shown["safety_identifier"]
        job = await service.jobs.submit(
            "video", job_id, requests, shown, context.caller, key,
            is_awaited=bool(how.wait_s), previews=service.jobs.previews_of(original), limits=how.limits,
        )  # fmt: skip
        return await _answer(service, context, how, job, response)

    return router


async def answer_with_job(
    service: Service,
    context: RequestContext,
    request: Request,
    response: Response,
    asked: VideoGenerationBody,
    source: ReadSource,
    choose: ChooseModel,
) -> VideoObject:
    """The job that makes what `asked` says, as soon as it is stored; with `Prefer: wait` as it stands then.

    `source` reads what the body refers to; it is not asked where the job is one of an earlier request.
    """
    if asked.response_format == "b64_json":
        raise NotSupportedError(
            "response_format='b64_json' is not supported, only 'url': the file is at /v1/videos/{id}/content",
            "response_format",
        )
    how = how_asked(request.headers, asked)
    key = idempotency_key(how, request.url.path, asked)
    job = await service.jobs.job_of_key(context.caller, key)
    if job is None:
        model = await choose()
        body, source_id = await source(model)
        job_id = new_job_id("video")
        requests = await model.parse(body, context.caller, job_id, how.limits)
        shown = shown_of_video(requests[0], await model.describe()) | {
            "remixed_from_video_id": source_id,
            "base_url": context.base_url,
        }
        if body.end_user is not None:
            shown["safety_identifier"] = body.end_user
        job = await service.jobs.submit(
            "video", job_id, requests, shown, context.caller, key, body.webhook_url,
            is_awaited=bool(how.wait_s), previews=body.partial_images or 0, limits=how.limits,
        )  # fmt: skip
    return await _answer(service, context, how, job, response)


async def model_to_remix(service: Service, context: RequestContext, original: Job) -> ModelService:
    """The one that made the original, or the one for videos where that is no longer served, or makes none now."""
    model = service.models.of_earlier(original.asked.model, context.caller)
    if model is not None:
        await model.served.wake_if_unknown()
    if model is None or (await model.describe()).media_kind != "video":
        model = await service.models.meant_by(VideoGenerationBody(), context.caller)
    context.model = model.name
    return model


def _remixed(request: GenerationRequest, model: str, prompt: str, job_id: str, number: int) -> GenerationRequest:
    """By the model that is served now: what was found out about the original holds for the model that made it only."""
    request_id = f"{job_id}-{number}" if "-" in request.request_id else job_id
    arguments = request.arguments | {"prompt": prompt}
    is_same = request.model == model
    return dataclasses.replace(
        request,
        request_id=request_id,
        model=model,
        arguments=arguments,
        num_steps=request.num_steps if is_same else None,
        warnings=tuple(each for each in request.warnings if is_same and each.code != "not_checked"),
        left_out=request.left_out if is_same else (),
    )


async def _answer(
    service: Service, context: RequestContext, asked: HowAsked, job: Job, response: Response
) -> VideoObject:
    if asked.wait_s is not None:
        job = await service.jobs.end_of(job.id, context.caller, asked.wait_s)
        response.headers["Preference-Applied"] = f"wait={asked.wait_s}"
    if not job.has_ended:
        response.headers[POLL_HEADER] = str(poll_after_ms(job, time.time()))
    return video_object(job, OutputURLs(service.storage, context.base_url))
