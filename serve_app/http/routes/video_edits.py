"""Videos from videos: POST /v1/videos/edits and /v1/videos/extensions; every answer is a job, as for other videos."""

from __future__ import annotations

import asyncio
import base64
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field
from pydantic.functional_serializers import PlainSerializer
from pydantic.functional_validators import PlainValidator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import StageDescription
from serve_app.http.answers import VideoObject
from serve_app.http.errors import ServeErrorRoute
from serve_app.http.reading import openapi_content, read_body
from serve_app.http.routes.jobs import IngressReplica, this_replica, video_job
from serve_app.http.routes.videos import answer_with_job
from serve_app.jobs.records import ConflictError
from serve_app.requests.bodies import VideoGenerationBody
from serve_app.requests.input_videos import ReadVideo, container_of, read_video

EDITING = "WanVideoToVideoPipeline, WanVACEPipeline, CogVideoXVideoToVideoPipeline or LTXConditionPipeline"
EXTENDING = (
    "WanImageToVideoPipeline, CogVideoXImageToVideoPipeline, LTXImageToVideoPipeline "
    "or HunyuanVideoImageToVideoPipeline"
)
TAKES_TENSORS = re.compile(r"EasyAnimate|AnyFlow|LatentUpsample")  # their `video` is not a list of pictures
MAX_FPS = 240.0


@dataclass(frozen=True)
class SourceVideo:
    """A video to start from: the bytes of a file, or the id of one that was made here."""

    data: bytes | None = None
    id: str | None = None


def _source_video(value: Any) -> SourceVideo:
    """From an uploaded file, a data URL, base64, or OpenAI's {"id": ...}."""
    if isinstance(value, dict) and isinstance(value.get("id"), str):
        return SourceVideo(id=value["id"])
    if isinstance(value, str):
        try:
            encoded = value.partition(",")[2] if value.startswith("data:") else value
            value = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise _no_video() from error
    if not isinstance(value, bytes) or container_of(value) is None:
        raise _no_video()
    return SourceVideo(value)


def _no_video() -> PydanticCustomError:
    return PydanticCustomError(
        "input_video", 'must be an MP4 or WebM file (an upload, a data URL or base64), or {"id": ...} of a video'
    )


Source = Annotated[
    SourceVideo,
    PlainValidator(_source_video),
    PlainSerializer(asdict),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}}},
            ]
        }
    ),
]


class VideoEditBody(VideoGenerationBody):
    """The body of POST /v1/videos/edits. Size and rate are those of the video, unless others are given."""

    video: Source = Field(description='the video to edit: an upload, a data URL, base64, or {"id": ...}')


class VideoExtensionBody(VideoGenerationBody):
    """The body of POST /v1/videos/extensions. Size and rate are those of the video, unless others are given."""

    video: Source = Field(description='the video to go on from: an upload, a data URL, base64, or {"id": ...}')


router = APIRouter(route_class=ServeErrorRoute)


@router.post("/v1/videos/edits", openapi_extra=openapi_content(VideoEditBody, files=("video",)))
async def edit_video(request: Request, response: Response) -> VideoObject:
    """A new video from a video and a prompt, as long as the first; for models whose pipeline takes `video`."""
    body = await read_body(request, VideoEditBody)
    ingress = this_replica()
    description = await ingress.describe()
    check_edit(body, description)
    source = await _read(ingress, body.video, last_frame_only=False)
    changes: dict[str, Any] = {"video": source.frames} | _like(source, body, description)
    if "num_frames" in description.parameters:
        changes["num_frames"] = len(source.frames)
    return await answer_with_job(ingress, request, response, body, body.model_copy(update=changes), body.video.id)


@router.post("/v1/videos/extensions", openapi_extra=openapi_content(VideoExtensionBody, files=("video", "last_image")))
async def extend_video(request: Request, response: Response) -> VideoObject:
    """What follows a video: a new one that begins with its last frame; for models that start from a picture."""
    body = await read_body(request, VideoExtensionBody)
    ingress = this_replica()
    description = await ingress.describe()
    check_extension(body, description)
    source = await _read(ingress, body.video, last_frame_only=True)
    changes = {"video": None, "image": source.frames[0]} | _like(source, body, description)
    return await answer_with_job(ingress, request, response, body, body.model_copy(update=changes), body.video.id)


@router.post("/v1/videos/characters", include_in_schema=False)
@router.get("/v1/videos/characters/{character_id}", include_in_schema=False)
async def refuse_characters(character_id: str | None = None) -> None:
    """OpenAI's characters: no pipeline of diffusers has what they are."""
    raise NotSupportedError("characters are not supported: no diffusion pipeline knows them")


def check_edit(body: VideoEditBody, description: StageDescription) -> None:
    """Raises NotSupportedError or InvalidRequestError."""
    if not _takes(description, "video") or TAKES_TENSORS.search(description.pipeline_class):
        raise NotSupportedError(
            f"{description.pipeline_class} cannot edit a video: models served with {EDITING} can", "video"
        )
    for field in ("seconds", "num_frames"):
        if getattr(body, field) is not None:
            raise InvalidRequestError(f"{field} is not supported here: an edit is as long as its video", field)


def check_extension(body: VideoExtensionBody, description: StageDescription) -> None:
    """Raises NotSupportedError or InvalidRequestError."""
    if description.media_kind != "video" or not _takes(description, "image"):
        raise NotSupportedError(
            f"{description.pipeline_class} does not start from a picture, so it cannot go on from a video's last: "
            f"models served with {EXTENDING} can",
            "video",
        )
    if body.image is not None:
        raise InvalidRequestError("image is not supported here: the video's last frame is the picture", "image")


def _takes(description: StageDescription, name: str) -> bool:
    return name in description.parameters or name in description.required


async def _read(ingress: IngressReplica, source: SourceVideo, last_frame_only: bool) -> ReadVideo:
    data = source.data
    if data is None:
        job = await video_job(ingress, source.id or "")
        if job.status != "completed":
            raise ConflictError(f"the video {job.id!r} cannot be used: it is {job.status}", "video", "video_not_ready")
        data, _ = await ingress.storage.load(job.outputs[0].key)
    return await asyncio.to_thread(read_video, data, ingress.args.limits, last_frame_only)


def _like(source: ReadVideo, body: VideoGenerationBody, description: StageDescription) -> dict[str, Any]:
    """The size and the rate of the source, where nothing else was asked for and the model can be told."""
    changes: dict[str, Any] = {}
    multiple = description.size_multiple
    width, height = (side - side % multiple for side in (source.width, source.height))
    if body.size is None and width and height and _takes(description, "width"):
        changes["size"] = f"{width}x{height}"
    if body.fps is None and source.fps is not None and 0 < source.fps <= MAX_FPS:
        changes["fps"] = source.fps
    return changes
