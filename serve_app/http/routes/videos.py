"""OpenAI's videos API: every video is a job; see serve_app.jobs."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import NotSupportedError
from deployments.messages import GenerationRequest
from serve_app.http.answers import DeletedVideo, VideoObject, VideoObjects, poll_after_ms, shown_of_video, video_object
from serve_app.http.byte_ranges import file_answer
from serve_app.http.errors import ServeErrorRoute
from serve_app.http.reading import openapi_content, read_body
from serve_app.http.routes.jobs import IngressReplica, Limit, Order, how_asked, idempotency_key, this_replica, video_job
from serve_app.jobs.records import Job, JobNotFoundError
from serve_app.jobs.service import new_job_id
from serve_app.making.admission import caller
from serve_app.requests.bodies import Text, VideoGenerationBody
from serve_app.storage.previews import spritesheet, thumbnail

Variant = Literal["video", "thumbnail", "spritesheet"]
PREVIEWS = {"thumbnail": thumbnail, "spritesheet": spritesheet}
POLL_HEADER = "openai-poll-after-ms"  # the client waits so long before it asks again


class VideoRemixBody(BaseModel):
    """The body of POST /v1/videos/{id}/remix."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field(min_length=1, description="instead of the first video's; all else stays, the seed too")


router = APIRouter(route_class=ServeErrorRoute)


@router.post("/v1/videos", openapi_extra=openapi_content(VideoGenerationBody, files=("image", "last_image")))
async def create_video(request: Request, response: Response) -> VideoObject:
    """A video as a job; it is stored before this is answered, and survives the end of any process."""
    body = await read_body(request, VideoGenerationBody)
    return await answer_with_job(this_replica(), request, response, body, body)


@router.get("/v1/videos")
async def list_videos(after: str | None = None, limit: Limit = 20, order: Order = "desc") -> VideoObjects:
    """The caller's videos, by the time they were asked for."""
    ingress = this_replica()
    page, has_more = await ingress.jobs.page(caller.get(), "video", after, limit, order)
    data = [video_object(job, ingress.storage) for job in page]
    return VideoObjects(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=has_more
    )


@router.get("/v1/videos/{video_id}")
async def read_video(video_id: str, response: Response) -> VideoObject:
    """A video as it stands."""
    ingress = this_replica()
    return _answer(ingress, await video_job(ingress, video_id), response)


@router.delete("/v1/videos/{video_id}")
async def delete_video(video_id: str) -> DeletedVideo:
    """Stop it if it is being made, and remove it and its files."""
    ingress = this_replica()
    await video_job(ingress, video_id)
    job = await ingress.jobs.delete(video_id, caller.get())
    return DeletedVideo(id=job.id)


@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses={
        200: {"content": {"video/mp4": {}, "image/webp": {}, "image/jpeg": {}}},
        206: {"description": "the range that was asked for"},
        304: {"description": "what the caller has (If-None-Match) is still the file"},
        416: {"description": "the range lies beyond the end of the file"},
    },
)
async def read_content(
    request: Request, video_id: str, variant: Variant = "video", index: Annotated[int, Query(ge=0, le=10_000)] = 0
) -> Response:
    """The file, its first frame, or a sheet of its frames; `index` counts from 0 where `n` was above 1."""
    ingress = this_replica()
    job = await video_job(ingress, video_id)
    if job.status != "completed":
        message = f"the video {job.id!r} has no content: it is {job.status}"
        raise JobNotFoundError(message, "video_id", "video_not_ready")
    if index >= len(job.outputs):
        raise JobNotFoundError(f"index: the video {job.id!r} has {len(job.outputs)} files, from 0", "index")
    data, content_type = await ingress.storage.load(job.outputs[index].key)
    if variant != "video":
        data, content_type = await asyncio.to_thread(PREVIEWS[variant], data)
    return file_answer(request.headers, data, content_type, f"{job.id}.{content_type.partition('/')[2]}")


@router.post("/v1/videos/{video_id}/remix")
async def remix_video(video_id: str, body: VideoRemixBody, request: Request, response: Response) -> VideoObject:
    """A new video with the parameters of another, its seed among them, and a new prompt."""
    ingress = this_replica()
    original = await video_job(ingress, video_id)
    description = await ingress.describe()
    if "prompt" not in {*description.parameters, *description.required}:
        raise NotSupportedError(f"{description.pipeline_class} does not take a prompt: it cannot remix", "prompt")
    job_id = new_job_id("video")
    requests = [
        _remixed(each, body.prompt, job_id, number)
        for number, each in enumerate(await ingress.jobs.requests_of(original))
    ]
    shown = shown_of_video(requests[0], description) | {"remixed_from_video_id": original.id}
    key = idempotency_key(how_asked(request.headers), f"/v1/videos/{original.id}/remix", body)
    job = await ingress.jobs.submit("video", job_id, requests, shown, caller.get(), key)
    return _answer(ingress, job, response)


async def answer_with_job(
    ingress: IngressReplica,
    request: Request,
    response: Response,
    asked: VideoGenerationBody,
    body: VideoGenerationBody,
    source_id: str | None = None,
) -> VideoObject:
    """The job that makes what `body` says; `asked` is the same as it came, before what it refers to was read."""
    if body.response_format == "b64_json":
        raise NotSupportedError(
            "response_format='b64_json' is not supported, only 'url': the file is at /v1/videos/{id}/content",
            "response_format",
        )
    job_id = new_job_id("video")
    requests = await ingress.parse(body, job_id)
    shown = shown_of_video(requests[0], await ingress.describe()) | {"remixed_from_video_id": source_id}
    key = idempotency_key(how_asked(request.headers), request.url.path, asked)
    job = await ingress.jobs.submit("video", job_id, requests, shown, caller.get(), key, body.webhook_url)
    return _answer(ingress, job, response)


def _remixed(request: GenerationRequest, prompt: str, job_id: str, number: int) -> GenerationRequest:
    request_id = f"{job_id}-{number}" if "-" in request.request_id else job_id
    return dataclasses.replace(request, request_id=request_id, arguments=request.arguments | {"prompt": prompt})


def _answer(ingress: IngressReplica, job: Job, response: Response) -> VideoObject:
    if not job.has_ended:
        response.headers[POLL_HEADER] = str(poll_after_ms(job, time.time()))
    return video_object(job, ingress.storage)
