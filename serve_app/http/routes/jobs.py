"""Requests as jobs: what `background`, `Prefer: respond-async` and `Idempotency-Key` ask for, and /v1/jobs."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from ray import serve

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import GenerationRequest, StageDescription
from serve_app.http.answers import DeletedJob, JobObject, job_object, result_of, shown_of_video
from serve_app.http.errors import ServeErrorRoute, error_json
from serve_app.http.middleware.limits import RequestLimits
from serve_app.http.middleware.prefix import route_prefix
from serve_app.http.openapi import EVENT_STREAM
from serve_app.jobs.records import IdempotencyKey, Job, JobNotFoundError
from serve_app.jobs.service import Jobs, body_digest, new_job_id
from serve_app.making.admission import caller
from serve_app.requests.bodies import GeneratedItem, ImageGenerationBody, ImagesAnswer, VideoGenerationBody
from serve_app.storage.base import StorageBackend

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class IngressArgs(Protocol):
    """What these routes use of its arguments."""

    @property
    def model_name(self) -> str: ...

    @property
    def limits(self) -> RequestLimits: ...


class IngressReplica(Protocol):
    """What these routes and those of videos use of the ingress."""

    jobs: Jobs
    storage: StorageBackend

    @property
    def args(self) -> IngressArgs: ...

    async def describe(self) -> StageDescription: ...

    async def parse(
        self, body: ImageGenerationBody | VideoGenerationBody, request_id: str | None = None
    ) -> list[GenerationRequest]: ...


def this_replica() -> IngressReplica:
    replica: IngressReplica = serve.get_replica_context().servable_object
    return replica


@dataclass(frozen=True)
class HowAsked:
    """What the headers of a request say about how it is to be answered."""

    idempotency_key: str | None
    respond_async: bool


def how_asked(headers: Mapping[str, str]) -> HowAsked:
    """Raises InvalidRequestError for a key that is none."""
    key = headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequestError("Idempotency-Key must have 1 to 255 printable ASCII characters", "Idempotency-Key")
    preferences = headers.get("prefer", "").lower().replace(" ", "").split(",")
    return HowAsked(key, any(each.partition(";")[0] == "respond-async" for each in preferences))


def idempotency_key(asked: HowAsked, route: str, body: BaseModel) -> IdempotencyKey | None:
    """The key stands for the body and the route that it came with."""
    if asked.idempotency_key is None:
        return None
    return IdempotencyKey(asked.idempotency_key, body_digest(route, body))


async def answer_by_job(
    ingress: IngressReplica,
    route: str,
    body: ImageGenerationBody | VideoGenerationBody,
    headers: Mapping[str, str],
) -> Response | ImagesAnswer | None:
    """The answer of a synchronous route whose caller asked for a job, or for one that can be asked again.

    With `background` or `Prefer: respond-async` the job itself, as soon as it is stored; with an
    Idempotency-Key what the job made, when it has ended, be it of this request or of an earlier one with the
    same key. None where neither is asked for.
    """
    asked = how_asked(headers)
    respond_async = asked.respond_async or getattr(body, "background", None) in (True, "true")
    if not respond_async and body.webhook_url is not None:
        raise NotSupportedError("webhook_url is for jobs: ask for one with Prefer: respond-async", "webhook_url")
    if not respond_async and asked.idempotency_key is None:
        return None
    if getattr(body, "stream", None):
        field = "background" if respond_async else "Idempotency-Key"
        raise NotSupportedError(f"{field} is not supported together with stream: a job has events of its own", field)
    kind, job_id = body.media_kind, new_job_id(body.media_kind)
    requests = await ingress.parse(body, job_id)
    shown = {"prompt": body.prompt}
    if kind == "video":
        shown |= shown_of_video(requests[0], await ingress.describe())
    owner = caller.get()
    key = idempotency_key(asked, route, body)
    job = await ingress.jobs.submit(
        kind, job_id, requests, shown, owner, key, body.webhook_url, is_awaited=not respond_async
    )
    if respond_async:
        content = await _job_object(ingress, job)
        location = {"Location": f"{route_prefix.get()}/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
        return JSONResponse(content.model_dump(), 202, location)
    job = await ingress.jobs.end_of(job.id, owner)
    if job.status != "completed":
        return _failure(job)
    return result_of(job, await _items(ingress.storage, job, body.response_format))


async def _items(storage: StorageBackend, job: Job, response_format: str) -> list[GeneratedItem]:
    items = []
    for output in job.outputs:
        item = GeneratedItem(seed=output.seed)
        if response_format == "url" or storage.is_shared:
            item.url = storage.url_of(output.key)
        if response_format == "b64_json":
            data, _ = await storage.load(output.key)
            item.b64_json = base64.b64encode(data).decode()
        items.append(item)
    return items


def _failure(job: Job) -> Response:
    """The answer that the job's error would have been without a job."""
    error: dict[str, Any] = dict(job.error or {})
    status = error.get("status", 409)  # 409: it was cancelled
    kind = error.get("type") or ("server_error" if status >= 500 else "invalid_request_error")
    return error_json(status, error["message"], kind, error.get("param"), error["code"])


async def _job_object(ingress: IngressReplica, job: Job) -> JobObject:
    return job_object(job, ingress.storage, await ingress.jobs.queue_position(job))


class JobObjects(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


router = APIRouter(route_class=ServeErrorRoute)

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


@router.get("/v1/jobs")
async def list_jobs(after: str | None = None, limit: Limit = 20, order: Order = "desc") -> JobObjects:
    """The caller's jobs, videos among them, by the time they were asked for."""
    ingress = this_replica()
    page, has_more = await ingress.jobs.page(caller.get(), None, after, limit, order)
    data = [await _job_object(ingress, job) for job in page]
    return JobObjects(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more
    )


@router.get("/v1/jobs/{job_id}")
async def read_job(job_id: str) -> JobObject:
    """A job as it stands."""
    ingress = this_replica()
    return await _job_object(ingress, await ingress.jobs.get(job_id, caller.get()))


@router.get(
    "/v1/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": EVENT_STREAM}},
)
async def follow_job(
    job_id: str, last_event_id: Annotated[int, Header(ge=0, le=2**31 - 1)] = 0
) -> StreamingResponse:
    """What happens to a job, as server-sent events up to its end; from after `Last-Event-ID`, if it is given."""
    ingress = this_replica()
    await ingress.jobs.get(job_id, caller.get())
    return StreamingResponse(
        ingress.jobs.events(job_id, last_event_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@router.post("/v1/jobs/{job_id}/cancel")
async def cancel_job(job_id: str) -> JobObject:
    """End a job that waits or runs; what it has stored is removed."""
    ingress = this_replica()
    return await _job_object(ingress, await ingress.jobs.cancel(job_id, caller.get()))


@router.delete("/v1/jobs/{job_id}")
async def delete_job(job_id: str) -> DeletedJob:
    """Cancel a job if it still runs, and remove it and what it has made."""
    job = await this_replica().jobs.delete(job_id, caller.get())
    return DeletedJob(id=job.id)


async def video_job(ingress: IngressReplica, video_id: str) -> Job:
    """The caller's video. Raises JobNotFoundError."""
    try:
        job = await ingress.jobs.get(video_id, caller.get())
    except JobNotFoundError:
        job = None
    if job is None or job.kind != "video":
        raise JobNotFoundError(f"there is no video {video_id[:96]!r}", "video_id", "video_not_found")
    return job
