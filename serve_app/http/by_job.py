"""A synchronous route whose caller asked for a job, or for an answer that can be asked for again."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse, Response

from deployments.messages import GenerationRequest
from serve_app.errors import JobNotFoundError
from serve_app.http.answers import (
    ImagesAnswer,
    JobObject,
    OutputURLs,
    items_of_job,
    job_object,
    result_of,
    shown_of_video,
)
from serve_app.http.asked import HowAsked, idempotency_key
from serve_app.http.context import RequestContext
from serve_app.http.errors import error_response
from serve_app.jobs.codec import error_from_json
from serve_app.jobs.records import Job
from serve_app.requests.bodies import ImageGenerationBody, VideoGenerationBody
from serve_app.service import Service


async def answer_by_job(
    service: Service,
    context: RequestContext,
    asked: HowAsked,
    route: str,
    body: ImageGenerationBody | VideoGenerationBody,
    job_id: str,
    requests: list[GenerationRequest],
) -> Response | ImagesAnswer:
    """With `background` or `Prefer: respond-async` the job itself, as soon as it is stored; with an
    Idempotency-Key what the job made, when it has ended, be it of this request or of an earlier one with the
    same key.

    Raises InvalidRequestError, OverloadedError, ConflictError.
    """
    kind = body.media_kind
    shown: dict[str, Any] = {"prompt": body.prompt}
    if body.end_user is not None:
        shown["safety_identifier"] = body.end_user
    if kind == "video":
        shown |= shown_of_video(requests[0], await service.model.describe())
    job = await service.jobs.submit(
        kind, job_id, requests, shown, context.caller, idempotency_key(asked, route, body), body.webhook_url,
        is_awaited=not asked.respond_async, previews=body.partial_images or 0,
    )  # fmt: skip
    if asked.respond_async:
        content = await describe_job(service, context, job)
        location = {"Location": f"{context.route_prefix}/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
        return JSONResponse(content.model_dump(), 202, location)
    job = await service.jobs.end_of(job.id, context.caller)
    if job.status != "completed":
        return error_response(error_from_json(job.error or {}))
    urls = OutputURLs(service.storage, context.route_prefix)
    return result_of(job, await items_of_job(body.response_format, job, urls))


async def describe_job(service: Service, context: RequestContext, job: Job) -> JobObject:
    """The job as its caller reads it."""
    urls = OutputURLs(service.storage, context.route_prefix)
    return job_object(job, urls, await service.jobs.queue_position(job))


async def video_job(service: Service, context: RequestContext, video_id: str) -> Job:
    """The caller's video. Raises JobNotFoundError."""
    try:
        job = await service.jobs.get(video_id, context.caller)
    except JobNotFoundError:
        job = None
    if job is None or job.kind != "video":
        raise JobNotFoundError(f"there is no video {video_id[:96]!r}", "video_id", "video_not_found")
    return job
