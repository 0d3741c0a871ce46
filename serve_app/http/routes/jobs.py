"""Any request as a job: /v1/jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from deployments.messages import MediaKind
from serve_app.errors import ConflictError, JobNotFoundError
from serve_app.http.answers import DeletedJob, JobObject
from serve_app.http.asked import WAITING_HEADER, how_asked
from serve_app.http.by_job import describe_job, retry_after, with_urls
from serve_app.http.byte_ranges import file_answer
from serve_app.http.context import Context
from serve_app.http.openapi import EVENT_STREAM, FILE_ANSWERS
from serve_app.http.sse import sse_of_job
from serve_app.http.streaming import event_stream
from serve_app.jobs.records import Status
from serve_app.service import Service
from serve_app.storage.base import CONTENT_TYPES

Limit = Annotated[int, Query(ge=1, le=100)]
MAX_NAME_CHARS = 200  # of a model, with room for a LoRA
Order = Literal["asc", "desc"]


class JobObjects(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def job_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/jobs")
    async def list_jobs(
        context: Context,
        after: str | None = None,
        limit: Limit = 20,
        order: Order = "desc",
        status: Annotated[tuple[Status, ...], Query(description="given again: any of several")] = (),
        kind: MediaKind | None = None,
        model: Annotated[
            str | None,
            Query(max_length=MAX_NAME_CHARS, description="one that is served, or was; a LoRA behind it is left out"),
        ] = None,
    ) -> JobObjects:
        """The caller's jobs, videos among them, by the time they were asked for; those with what is named."""
        own_name = None if model is None else service.models.own_name(model, context.caller)
        page, has_more = await service.jobs.page(context.caller, kind, after, limit, order, status, own_name)
        data = [await describe_job(service, context, job) for job in page]
        return JobObjects(
            data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more
        )

    @router.get("/v1/jobs/{job_id}", openapi_extra=WAITING_HEADER)
    async def read_job(request: Request, job_id: str, response: Response, context: Context) -> JobObject:
        """A job as it stands; with `Prefer: wait=n` when it has ended, or after n seconds."""
        wait_s = how_asked(request.headers).wait_s
        job = await service.jobs.end_of(job_id, context.caller, wait_s or 0)
        if wait_s is not None:
            response.headers["Preference-Applied"] = f"wait={wait_s}"
        if not job.has_ended:
            response.headers["Retry-After"] = retry_after(job)
        return await describe_job(service, context, job)

    @router.get(
        "/v1/jobs/{job_id}/events", response_class=StreamingResponse, responses={200: {"content": EVENT_STREAM}}
    )
    async def follow_job(
        job_id: str, context: Context, last_event_id: Annotated[int, Header(ge=0, le=2**31 - 1)] = 0
    ) -> StreamingResponse:
        """What happens to a job, as server-sent events up to its end; from after `Last-Event-ID`, if it is given."""
        await service.jobs.get(job_id, context.caller)
        events = service.jobs.events(job_id, last_event_id)
        return event_stream(sse_of_job(with_urls(service, context, job_id, events)))

    @router.get(
        "/v1/jobs/{job_id}/content",
        response_class=Response,
        responses=FILE_ANSWERS | {200: {"content": {content_type: {} for content_type in CONTENT_TYPES.values()}}},
    )
    async def read_output(
        request: Request, job_id: str, context: Context, index: Annotated[int, Query(ge=0, le=10_000)] = 0
    ) -> Response:
        """A file of a completed job, wherever it is stored; `index` counts from 0."""
        job = await service.jobs.get(job_id, context.caller)
        if job.status != "completed":
            raise ConflictError(f"the job {job.id!r} has no content: it is {job.status}", "id", "output_not_ready")
        if index >= len(job.outputs):
            raise JobNotFoundError(f"index: the job {job.id!r} has {len(job.outputs)} files, from 0", "index")
        key = job.outputs[index].key
        data, content_type = await service.storage.load(key)
        name = key.rpartition("/")[2]
        return file_answer(request.headers, data, content_type, name, job.completed_at or job.created_at)

    @router.post("/v1/jobs/{job_id}/cancel")
    async def cancel_job(job_id: str, context: Context) -> JobObject:
        """End a job that waits or runs; what it has stored is removed."""
        return await describe_job(service, context, await service.jobs.cancel(job_id, context.caller))

    @router.delete("/v1/jobs/{job_id}")
    async def delete_job(job_id: str, context: Context) -> DeletedJob:
        """Cancel a job if it still runs, and remove it and what it has made."""
        job = await service.jobs.delete(job_id, context.caller)
        return DeletedJob(id=job.id)

    return router
