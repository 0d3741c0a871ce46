"""The bodies of edits: pictures from pictures, videos from videos."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator
from pydantic.functional_serializers import PlainSerializer
from pydantic.functional_validators import PlainValidator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.messages import MediaKind
from serve_app.requests.bodies import ImageGenerationBody, InputImages, Text, VideoGenerationBody
from serve_app.requests.given.encoded_files import file_bytes
from serve_app.requests.input_videos import VIDEO_FILE, container_of
from serve_app.requests.plain_values import given_value


class ImageEditBody(ImageGenerationBody):
    """The body of POST /v1/images/edits: that of generations, with pictures."""

    media_kind: ClassVar[MediaKind] = "image"

    image: InputImages = Field(
        None,
        validation_alias=AliasChoices("image", "images"),
        description="the pictures to edit: uploads (`image` or `image[]`), data URLs or base64",
    )
    mask_image: InputImages = Field(
        None,
        validation_alias=AliasChoices("mask", "mask_image"),
        description="transparent where the first picture is to be repainted; of a mask without alpha, what is white. "
        "Without a mask the alpha of the picture is one",
    )
    markup: InputImages = Field(
        None, description="a picture with transparent parts, laid over the first `image`; not together with a mask"
    )
    input_fidelity: Text | None = Field(
        None, max_length=64, description="no effect: the model decides how close it stays to `image`"
    )


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
            value = file_bytes(value)
        except ValueError as error:
            raise _no_video() from error
    if not isinstance(value, bytes) or container_of(value) is None:
        raise _no_video()
    return SourceVideo(value)


def _no_video() -> PydanticCustomError:
    return PydanticCustomError(
        "input_video",
        f'must be {VIDEO_FILE} (an upload, a data URL or base64), or {{"id": ...}} of a video',
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


class VideoRemixBody(BaseModel):
    """The body of POST /v1/videos/{id}/remix."""

    model_config = ConfigDict(extra="forbid")

    given_value = field_validator("*", mode="before")(classmethod(given_value))

    prompt: Text = Field(min_length=1, description="instead of the first video's; all else stays, the seed too")
