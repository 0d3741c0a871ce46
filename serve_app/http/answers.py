"""What callers read: the answers of the synchronous routes, OpenAI's video object, our job object, models."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import BaseModel, Field

from deployments.messages import (
    Background,
    GenerationRequest,
    Media,
    MediaFile,
    MediaKind,
    RequestWarning,
    StageDescription,
    Usage,
)
from serve_app.jobs.codec import error_from_json
from serve_app.jobs.records import Job, Output
from serve_app.requests.translate import DEFAULT_FPS
from serve_app.storage.outputs import OutputURLs, store_media

MIN_POLL_MS, MAX_POLL_MS = 250, 10_000
VIDEO_STATUS: dict[str, Literal["queued", "in_progress", "completed", "failed"]] = {
    "queued": "queued",
    "in_progress": "in_progress",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "failed",  # OpenAI's videos know no other word; the error's code says it
}


class GeneratedItem(BaseModel):
    """One file: its bytes or where they are."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: None = None
    seed: int


class InputTokens(BaseModel):
    """Parts of `UsageAnswer.input_tokens`."""

    text_tokens: int = Field(description="of prompt and negative prompt, by the pipeline's first tokenizer")
    image_tokens: int = Field(description="of the pictures sent along, at their own sizes")


class OutputTokens(BaseModel):
    """Parts of `UsageAnswer.output_tokens`."""

    image_tokens: int
    text_tokens: Literal[0] = 0


class UsageAnswer(BaseModel):
    """What a request was, in tokens; nothing is billed by them. Those of pictures are places of the model's latents."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int

    @classmethod
    def of(cls, usages: Iterable[Usage]) -> Self:
        each = list(usages)
        text, image = sum(usage.text_tokens for usage in each), sum(usage.image_tokens for usage in each)
        output = sum(usage.output_tokens for usage in each)
        return cls(
            input_tokens=text + image,
            input_tokens_details=InputTokens(text_tokens=text, image_tokens=image),
            output_tokens=output,
            output_tokens_details=OutputTokens(image_tokens=output),
            total_tokens=text + image + output,
        )


class MadeAnswer(BaseModel):
    """What every synchronous route answers with; all of it where tensors are made."""

    created: int  # Unix time in seconds
    model: str
    data: list[GeneratedItem]
    output_format: str
    safety_identifier: str | None = Field(description="of the request, or its `user`")
    usage: UsageAnswer
    timings: list[dict[str, float]] = Field(description="seconds of each part, for each of the n")
    steps: list[int | None] = Field(description="scheduler steps that were made, for each of the n")
    warnings: list[RequestWarning] = Field(description="what had no effect, or was not read")


class ImagesAnswer(MadeAnswer):
    """What the OpenAI client reads as ImagesResponse, and a little more."""

    size: str
    background: Background = Field(description="transparent: the alpha that the model made is kept")


class VideosAnswer(ImagesAnswer):
    """The same for videos, with their length."""

    num_frames: int
    fps: float | None
    seconds: float | None = Field(description="how long the video is that was made")


class AudioAnswer(MadeAnswer):
    """The same for sound."""

    seconds: float | None = Field(description="how long the sound is that was made")
    sample_rate: int | None = Field(description="samples per second")
    channels: int | None = Field(description="1: mono, 2: stereo")


Answer = VideosAnswer | ImagesAnswer | AudioAnswer | MadeAnswer


class ModelCard(BaseModel):
    """A served model, as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int  # Unix time in seconds
    owned_by: str = "triptych"
    parent: str | None = Field(None, description="of a LoRA: the model that it changes")
    alias_of: str | None = Field(None, description="the model's own name, where this is another one of it")
    kind: MediaKind | None = Field(None, description="what it makes; null: it is not ready to tell")
    state: Literal["ready", "loading", "asleep"] = Field(
        description="loading: it cannot serve yet; asleep: it has given its accelerators back until a request comes"
    )
    load_s: float | None = Field(
        None, description="of a model that is asleep or loading: what its last load took; null: not measured"
    )


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class JobError(BaseModel):
    """Why a job failed, with the codes of synchronous errors."""

    code: str
    message: str
    type: str | None = None
    param: str | None = Field(None, description="the field at fault")


class VideoObject(BaseModel):
    """A video as OpenAI's client knows it, and a little more."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(description="0..100, never less than before; 100 if and only if completed")
    created_at: int  # Unix time in seconds
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    seconds: str
    size: str
    remixed_from_video_id: str | None
    error: JobError | None
    seed: int
    urls: list[str] = Field(description="of the files, when it is completed")
    upload: Literal["pending", "done"] | None = Field(description="pending: not yet in the storage, but served")
    warnings: list[RequestWarning] = Field(description="what had no effect, or was not read")


class VideoObjects(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """The answer to DELETE /v1/videos/{id}."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class DeletedJob(BaseModel):
    """The answer to DELETE /v1/jobs/{id}."""

    id: str
    object: Literal["job.deleted"] = "job.deleted"
    deleted: Literal[True] = True


class JobObject(BaseModel):
    """Any request as a job."""

    id: str
    object: Literal["job"] = "job"
    kind: MediaKind
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int = Field(description="0..100, never less than before; 100 if and only if completed")
    queue_position: int | None = Field(description="how many are before it, while it is queued")
    created_at: int  # Unix time in seconds
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    error: JobError | None
    upload: Literal["pending", "done"] | None = Field(description="pending: not yet in the storage, but served")
    warnings: list[RequestWarning] = Field(description="what had no effect, or was not read")
    result: Answer | None = Field(description="the synchronous answer, with URLs")


# --- from what was made ---


def answer_of(
    kind: MediaKind,
    items: list[GeneratedItem],
    requests: list[GenerationRequest],
    media: list[Media],
    end_user: str | None = None,
) -> Answer:
    """What the route of this kind answers at once: that of images may have made a moving one."""
    common: dict[str, Any] = {
        "created": int(time.time()),
        "model": requests[0].model,
        "data": items,
        "output_format": requests[0].output.format,
        "safety_identifier": end_user,
        "usage": UsageAnswer.of(made.usage for made in media),
        "timings": [made.seconds for made in media],
        "steps": [made.num_steps for made in media],
        "warnings": list(dict.fromkeys(warning for made in media for warning in made.warnings)),
    }
    return _answer(kind, common, media[0].files[0], requests[0].output.background)


def _answer(kind: MediaKind, common: dict[str, Any], first: MediaFile | Output, background: Background) -> Answer:
    """With the measures of the first file."""
    seen = {"size": f"{first.width}x{first.height}", "background": background}
    match kind:
        case "image":
            return ImagesAnswer(**common, **seen)
        case "video":
            length = {"num_frames": first.num_frames, "fps": first.fps, "seconds": first.seconds}
            return VideosAnswer(**common, **seen, **length)
        case "audio":
            rate, channels = first.sample_rate, first.channels
            return AudioAnswer(**common, seconds=first.seconds, sample_rate=rate, channels=channels)
        case "tensors":
            return MadeAnswer(**common)


async def items_of_media(
    response_format: str, requests: list[GenerationRequest], media: list[Media], urls: OutputURLs
) -> list[GeneratedItem]:
    """One item a file: with its bytes, or stored and with its URL. Raises StorageError."""
    items = []
    for request, made in zip(requests, media, strict=True):
        keys: list[str] = []
        if response_format == "url" or urls.storage.is_shared:
            keys = [file.key for file in await store_media(urls.storage, request, made)]
        for index, file in enumerate(made.files):
            content = base64.b64encode(file.data).decode() if response_format == "b64_json" else None
            url = urls.of(keys[index]) if keys else None
            items.append(GeneratedItem(b64_json=content, url=url, seed=request.seed))
    return items


async def items_of_job(response_format: str, job: Job, urls: OutputURLs) -> list[GeneratedItem]:
    """The same for a completed job, whose files are stored. Raises ObjectNotFoundError, StorageError."""
    urls, items = urls.below(job.base_url), []
    for output in job.outputs:
        item = GeneratedItem(seed=output.seed)
        if response_format == "url" or urls.storage.is_shared:
            item.url = urls.of(output.key)
        if response_format == "b64_json":
            data, _ = await urls.storage.load(output.key)
            item.b64_json = base64.b64encode(data).decode()
        items.append(item)
    return items


# --- from jobs ---


def video_object(job: Job, urls: OutputURLs) -> VideoObject:
    urls, shown = urls.below(job.base_url), job.shown
    made = job.outputs[0] if job.outputs else None
    return VideoObject(
        id=job.id,
        model=job.asked.model,
        status=VIDEO_STATUS[job.status],
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=_seconds(job.completed_at if job.status == "completed" else None),
        expires_at=_seconds(job.expires_at),
        prompt=shown.get("prompt"),
        seconds=_shown_seconds(made) or shown.get("seconds") or "",
        size=f"{made.width}x{made.height}" if made else shown.get("size") or "",
        remixed_from_video_id=shown.get("remixed_from_video_id"),
        error=_error(job),
        seed=job.asked.seed,
        urls=[urls.of(output.key) for output in job.outputs] if job.status == "completed" else [],
        upload=_upload(job),
        warnings=list(job.warnings),
    )


def job_object(job: Job, urls: OutputURLs, queue_position: int | None) -> JobObject:
    urls = urls.below(job.base_url)
    items = [GeneratedItem(url=urls.of(output.key), seed=output.seed) for output in job.outputs]
    return JobObject(
        id=job.id,
        kind=job.kind,
        model=job.asked.model,
        status=job.status,
        progress=job.progress,
        queue_position=queue_position,
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        completed_at=_seconds(job.completed_at),
        expires_at=_seconds(job.expires_at),
        error=_error(job),
        upload=_upload(job),
        warnings=list(job.warnings),
        result=result_of(job, items) if job.status == "completed" else None,
    )


def result_of(job: Job, items: list[GeneratedItem]) -> Answer:
    """What the synchronous route would have answered; the job is completed."""
    common: dict[str, Any] = {
        "created": int(job.completed_at or job.created_at),
        "model": job.asked.model,
        "data": items,
        "output_format": job.asked.output_format,
        "safety_identifier": job.shown.get("safety_identifier"),
        "usage": UsageAnswer.of(usages_of(job).values()),
        "timings": [job.timings[str(number)] for number in range(len(job.requests))],
        "steps": [_steps_of(job, number) for number in range(len(job.requests))],
        "warnings": list(job.warnings),
    }
    return _answer(job.kind, common, job.outputs[0], background_of(job))


def _shown_seconds(made: Output | None) -> str | None:
    seconds = made.seconds if made else None
    return None if seconds is None else f"{seconds:g}"


def _steps_of(job: Job, number: int) -> int | None:
    return next((output.num_steps for output in job.outputs if output.request == number), None)


def poll_after_ms(job: Job, now: float) -> int:
    """When to ask again: a tenth of the time that is left, if the rest goes as it went."""
    if not job.progress or job.started_at is None:
        return 1000
    left_s = (now - job.started_at) / job.progress * (100 - job.progress)
    return round(min(MAX_POLL_MS, max(MIN_POLL_MS, 100 * left_s)))


def shown_of_video(request: GenerationRequest, description: StageDescription) -> dict[str, Any]:
    """What a video object repeats of its request before there is a file to ask."""

    def argument(name: str, default: Any = None) -> Any:
        return request.arguments.get(name) or description.parameters.get(name) or default

    width, height = argument("width", description.default_width), argument("height", description.default_height)
    num_frames = argument("num_frames")
    return {
        "prompt": request.arguments.get("prompt"),
        "size": f"{width}x{height}" if width and height else "",
        "seconds": f"{num_frames / (request.output.fps or DEFAULT_FPS):g}" if num_frames else "",
    }


def background_of(job: Job) -> Background:
    """Opaque where the job's row does not say it."""
    return "transparent" if job.asked.background == "transparent" else "opaque"


def usages_of(job: Job) -> dict[str, Usage]:
    """By the number of the request; jobs that an earlier version made have none."""
    return {number: Usage(**usage) for number, usage in (job.shown.get("usage") or {}).items()}


def _error(job: Job) -> JobError | None:
    if job.error is None:
        return None
    report = error_from_json(job.error)
    return JobError(code=report.code or report.type, message=report.message, type=report.type, param=report.param)


def _upload(job: Job) -> Literal["pending", "done"] | None:
    if not job.outputs:
        return None
    return "pending" if any(output.upload_pending for output in job.outputs) else "done"


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
