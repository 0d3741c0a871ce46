"""A synchronous route: its answer at once, or by a job where its caller asked for one, or to be able to ask again."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse, Response

from serve_app.errors import JobNotFoundError, JobStoreAwayError
from serve_app.http.answers import (
    Answer,
    JobObject,
    answer_of,
    items_of_job,
    items_of_media,
    job_object,
    poll_after_ms,
    result_of,
    shown_of_video,
)
from serve_app.http.asked import HowAsked, check_how_asked, how_asked, idempotency_key
from serve_app.http.context import RequestContext
from serve_app.http.errors import error_response
from serve_app.http.middleware.limits import too_large
from serve_app.jobs.codec import error_from_json
from serve_app.jobs.events import JobEvent
from serve_app.jobs.records import Job
from serve_app.jobs.service import new_job_id
from serve_app.models.service import ModelService
from serve_app.requests.bodies import MediaBody
from serve_app.service import Service
from serve_app.storage.outputs import OutputURLs

# The model that a body means, which may then be checked against it; raises InvalidRequestError, StageUnavailableError.
ChooseModel = Callable[[], Awaitable[ModelService]]


async def model_for(service: Service, context: RequestContext, body: MediaBody) -> ModelService:
    """The model that the body means. Raises what `meant_by` raises, and 413 for a body beyond its limit."""
    model = await service.models.meant_by(body, context.caller)
    context.model = model.name
    if context.body_bytes > model.limits.max_body_bytes:
        raise HTTPException(413, too_large(model.limits.max_body_bytes))
    return model


async def answer_by_job(
    service: Service,
    context: RequestContext,
    asked: HowAsked,
    route: str,
    body: MediaBody,
    choose: ChooseModel,
) -> Response:
    """What the job made, when it has ended, be it of this request or of an earlier one with the same key; with
    `background`, `Prefer: respond-async` or `wait` the job itself, if it takes longer than was to be waited.

    The job goes on when the caller hangs up. Raises InvalidRequestError, OverloadedError, ConflictError.
    """
    job = await job_of_body(service, context, asked, route, body, choose)
    applied = {"Preference-Applied": asked.preference_applied} if asked.preference_applied else {}
    if asked.respond_async and not asked.wait_s:
        return await answer_with_job_object(service, context, job, applied)
    if asked.wait_s is None and not job.has_ended:
        await wait_for_its_model(service, job)
    job = await service.jobs.end_of(job.id, context.caller, math.inf if asked.wait_s is None else asked.wait_s)
    if not job.has_ended:
        return await answer_with_job_object(service, context, job, applied)
    if job.status != "completed":
        return error_response(error_from_json(job.error or {}), applied)
    urls = OutputURLs(service.storage, context.base_url)
    answer = result_of(job, await items_of_job(body.response_format, job, urls))
    return JSONResponse(answer.model_dump(), headers=applied)


async def wait_for_its_model(service: Service, job: Job) -> None:
    """As long as a caller waits for a model that was asleep. Raises ModelLoadingError; the job goes on."""
    making = service.jobs.models.get(job.asked.model)
    if making is not None:
        sleep = making.model.stages.sleep
        await sleep.awake(max_wait_s=sleep.max_wait_s)


async def answer_generation(
    service: Service, context: RequestContext, request: Request, body: MediaBody
) -> Answer | Response:
    """What the body asks for, when it is made, or the job that makes it."""
    asked = how_asked(request.headers, body)
    check_how_asked(asked, body)

    async def choose() -> ModelService:
        return await model_for(service, context, body)

    if asked.wants_job:
        return await answer_by_job(service, context, asked, request.url.path, body, choose)
    model = await choose()
    requests = await model.parse(body, context.caller, limits=asked.limits)
    media = await model.at_once.all(requests, context.caller, asked.limits)
    context.count_compute(media)
    urls = OutputURLs(service.storage, context.base_url)
    items = await items_of_media(body.response_format, requests, media, urls)
    return answer_of(body.media_kind, items, requests, media, body.end_user)


async def job_of_body(
    service: Service,
    context: RequestContext,
    asked: HowAsked,
    route: str,
    body: MediaBody,
    choose: ChooseModel,
) -> Job:
    """The job that makes what `body` says, or the one of an earlier request with the same key.

    A repeated request is not read again: pictures that it names may be gone, and so may its model.
    """
    key = idempotency_key(asked, route, body)
    known = await service.jobs.job_of_key(context.caller, key)
    if known is not None:
        return known
    kind = body.media_kind
    job_id = new_job_id(kind)
    model = await choose()
    requests = await model.parse(body, context.caller, job_id, asked.limits)
    shown: dict[str, Any] = {"prompt": body.prompt, "base_url": context.base_url}
    if body.end_user is not None:
        shown["safety_identifier"] = body.end_user
    if kind == "video":
        shown |= shown_of_video(requests[0], await model.describe())
    return await service.jobs.submit(
        kind, job_id, requests, shown, context.caller, key, body.webhook_url,
        is_awaited=asked.is_awaited, previews=getattr(body, "partial_images", None) or 0, limits=asked.limits,
    )  # fmt: skip


async def answer_with_job_object(
    service: Service, context: RequestContext, job: Job, headers: dict[str, str]
) -> Response:
    """202, where the job is and when to ask for it."""
    content = await describe_job(service, context, job)
    headers = {"Location": f"{context.route_prefix}/v1/jobs/{job.id}", "Retry-After": retry_after(job), **headers}
    return JSONResponse(content.model_dump(), 202, headers)


def retry_after(job: Job) -> str:
    """Whole seconds until it is worth to ask for the job again."""
    return str(math.ceil(poll_after_ms(job, time.time()) / 1000))


async def describe_job(service: Service, context: RequestContext, job: Job) -> JobObject:
    """The job as its caller reads it."""
    urls = OutputURLs(service.storage, context.base_url)
    return job_object(job, urls, await service.jobs.queue_position(job))


async def with_urls(
    service: Service, context: RequestContext, job_id: str, events: AsyncIterator[JobEvent]
) -> AsyncIterator[JobEvent]:
    """The job's events; the one of its completion has the URLs of its files, unless they cannot be read now."""
    async for event in events:
        if event.kind == "completed":
            event = await _with_urls(service, context, job_id, event)
        yield event


async def _with_urls(service: Service, context: RequestContext, job_id: str, event: JobEvent) -> JobEvent:
    try:
        job = await service.jobs.get(job_id, context.caller)
    except (JobNotFoundError, JobStoreAwayError):  # that the job is completed is told in any case
        return event
    urls = OutputURLs(service.storage, context.base_url).below(job.base_url)
    return dataclasses.replace(event, data=event.data | {"urls": [urls.of(each.key) for each in job.outputs]})


async def video_job(service: Service, context: RequestContext, video_id: str) -> Job:
    """The caller's video. Raises JobNotFoundError."""
    try:
        job = await service.jobs.get(video_id, context.caller)
    except JobNotFoundError:
        job = None
    if job is None or job.kind != "video":
        raise JobNotFoundError(f"there is no video {video_id[:96]!r}", "video_id", "video_not_found")
    return job
