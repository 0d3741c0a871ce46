"""Videos from videos: POST /v1/videos/edits and /v1/videos/extensions; every answer is a job, as for other videos."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import StageDescription
from serve_app.errors import ConflictError
from serve_app.http.answers import VideoObject
from serve_app.http.asked import ASKING_HEADERS
from serve_app.http.by_job import model_for, video_job
from serve_app.http.context import Context, RequestContext
from serve_app.http.reading import openapi_content, read_body
from serve_app.http.routes.videos import answer_with_job
from serve_app.models.service import ModelService
from serve_app.requests.bodies import VideoGenerationBody
from serve_app.requests.edit_bodies import SourceVideo, VideoEditBody, VideoExtensionBody
from serve_app.requests.input_videos import ReadVideo, read_video
from serve_app.service import Service

EDITING = "WanVideoToVideoPipeline, WanVACEPipeline, CogVideoXVideoToVideoPipeline or LTXConditionPipeline"
EXTENDING = (
    "WanImageToVideoPipeline, CogVideoXImageToVideoPipeline, LTXImageToVideoPipeline "
    "or HunyuanVideoImageToVideoPipeline"
)
MAX_FPS = 240.0


def video_edit_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/videos/edits", openapi_extra=ASKING_HEADERS | openapi_content(VideoEditBody, files=("video",)))
    async def edit_video(request: Request, response: Response, context: Context) -> VideoObject:
        """A new video from a video and a prompt, as long as the first; for models whose pipeline takes `video`."""
        asked = await read_body(request, VideoEditBody)

        async def choose() -> ModelService:
            model = await model_for(service, context, asked)
            check_edit(asked, await model.describe())
            return model

        async def source(model: ModelService) -> tuple[VideoGenerationBody, str | None]:
            description = await model.describe()
            video = await _read(service, context, model, asked.video, last_frame_only=False)
            changes: dict[str, Any] = {"video": video.frames} | _like(video, asked, description)
            if "num_frames" in description.parameters:
                changes["num_frames"] = len(video.frames)
            return asked.model_copy(update=changes), asked.video.id

        return await answer_with_job(service, context, request, response, asked, source, choose)

    @router.post(
        "/v1/videos/extensions",
        openapi_extra=ASKING_HEADERS | openapi_content(VideoExtensionBody, files=("video", "last_image")),
    )
    async def extend_video(request: Request, response: Response, context: Context) -> VideoObject:
        """What follows a video: a new one that begins with its last frame; for models that start from a picture."""
        asked = await read_body(request, VideoExtensionBody)

        async def choose() -> ModelService:
            model = await model_for(service, context, asked)
            check_extension(asked, await model.describe())
            return model

        async def source(model: ModelService) -> tuple[VideoGenerationBody, str | None]:
            description = await model.describe()
            video = await _read(service, context, model, asked.video, last_frame_only=True)
            changes = {"video": None, "image": video.frames[0]} | _like(video, asked, description)
            return asked.model_copy(update=changes), asked.video.id

        return await answer_with_job(service, context, request, response, asked, source, choose)

    @router.post("/v1/videos/characters", include_in_schema=False)
    @router.get("/v1/videos/characters/{character_id}", include_in_schema=False)
    async def refuse_characters(character_id: str | None = None) -> None:
        """OpenAI's characters: no pipeline of diffusers has what they are."""
        raise NotSupportedError("characters are not supported: no diffusion pipeline knows them")

    return router


def check_edit(body: VideoEditBody, description: StageDescription) -> None:
    """Raises NotSupportedError, and InvalidRequestError for a field without effect where the body is strict."""
    if "video_to_video" not in description.tasks:
        raise NotSupportedError(
            f"{description.pipeline_class} cannot edit a video: models served with {EDITING} can", "video"
        )
    for field in ("seconds", "num_frames"):
        if getattr(body, field) is not None:
            body.refuse(InvalidRequestError(f"{field} is not supported here: an edit is as long as its video", field))


def check_extension(body: VideoExtensionBody, description: StageDescription) -> None:
    """Raises NotSupportedError, and InvalidRequestError for a field without effect where the body is strict."""
    if "image_to_video" not in description.tasks:
        raise NotSupportedError(
            f"{description.pipeline_class} does not start from a picture, so it cannot go on from a video's last: "
            f"models served with {EXTENDING} can",
            "video",
        )
    if body.image is not None:
        body.refuse(InvalidRequestError("image is not supported here: the video's last frame is the picture", "image"))


async def _read(
    service: Service, context: RequestContext, model: ModelService, source: SourceVideo, last_frame_only: bool
) -> ReadVideo:
    data = source.data
    if data is None:
        job = await video_job(service, context, source.id or "")
        if job.status != "completed":
            raise ConflictError(f"the video {job.id!r} cannot be used: it is {job.status}", "video", "video_not_ready")
        data, _ = await service.storage.load(job.outputs[0].key)
    return await asyncio.to_thread(read_video, data, model.limits, last_frame_only)


def _like(source: ReadVideo, body: VideoGenerationBody, description: StageDescription) -> dict[str, Any]:
    """The size and the rate of the source, where nothing else was asked for and the model can be told."""
    changes: dict[str, Any] = {}
    multiple = description.size_multiple
    width, height = (side - side % multiple for side in (source.width, source.height))
    if body.size is None and width and height and description.takes("width"):
        changes["size"] = f"{width}x{height}"
    if body.fps is None and source.fps is not None and 0 < source.fps <= MAX_FPS:
        changes["fps"] = source.fps
    return changes
