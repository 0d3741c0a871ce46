"""The bodies that callers send, in OpenAI's words and ours."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator
from pydantic.functional_serializers import PlainSerializer
from pydantic.functional_validators import AfterValidator, PlainValidator
from pydantic.json_schema import SkipJsonSchema, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.errors import InvalidRequestError
from deployments.messages import PICTURE_FILE, InputImage, MediaKind, RequestWarning
from env_config.closest import did_you_mean
from serve_app.requests.given.references import HOW_GIVEN, EarlierOutput, RemoteFile, reference_of
from serve_app.requests.loras import FIELD, OTHER_NAMES, LoRAs
from serve_app.requests.plain_values import given_value, read_value

T = TypeVar("T")

# Names that people try, and what is meant; also arguments of pipelines that have a field of another name.
FIELD_INSTEAD = {
    "width": "size",
    "height": "size",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "num_images": "n",
    "num_images_per_prompt": "n",
    "num_videos_per_prompt": "n",
    "num_waveforms_per_prompt": "n",
    "frame_rate": "fps",
    **dict.fromkeys(OTHER_NAMES, FIELD),
}
MAX_PICTURE_DEPTH = 3
_ARGUMENT = re.compile(r"[A-Za-z_]\w{0,79}", re.ASCII)  # what an argument of a pipeline can be called
INSIDE = ("warnings", "own_arguments")  # of a body, not for callers
SIZE_PATTERN = r"(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})"
# The first bytes of such files. AVIF and HEIC: the brands of ISO/IEC 23008-12 (HEIF).
IMAGE_SIGNATURES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|II[*+]\0|MM\0[*+]|BM"
    rb"|....ftyp(avi[fs]|hei[cmsx]|hev[cmsx]|mif[12]|msf1)",
    re.DOTALL,
)


NO_PICTURE = f"a picture must be {PICTURE_FILE}"


def _input_image(value: Any) -> Picture:
    """From a data URL, base64, a URL, OpenAI's {"image_url": ...}, an earlier output, or an uploaded file's bytes."""
    if isinstance(value, InputImage):
        return value
    try:
        reference = reference_of(value)
    except ValueError as error:
        raise PydanticCustomError("input_image", f"{NO_PICTURE}: {HOW_GIVEN}") from error
    if not isinstance(reference, bytes):
        return reference
    if not IMAGE_SIGNATURES.match(reference):
        raise PydanticCustomError("input_image", NO_PICTURE)
    return InputImage(reference)


Picture = InputImage | RemoteFile | EarlierOutput
Pictures = Picture | list[Any] | None  # lists may lie in lists, and have null in them


def _input_images(value: Any, depth: int = 0) -> Pictures:
    if value is None:
        return None
    if isinstance(value, list):
        if depth >= MAX_PICTURE_DEPTH or not value:
            raise PydanticCustomError("input_image", f"lists of pictures may lie {MAX_PICTURE_DEPTH} deep, none empty")
        images = [_input_images(item, depth + 1) for item in value]
        return images[0] if len(images) == 1 and not depth else images
    return _input_image(value)


def _encodable(value: T) -> T:
    """JSON can hold halves of characters (lone surrogates), which no tokenizer and no file can."""
    if "\\ud" in json.dumps(value) and re.search(r"[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
        raise PydanticCustomError("not_unicode", "must be valid Unicode, it has a lone surrogate")
    return value


def _size(value: str) -> str:
    if re.fullmatch(SIZE_PATTERN, value, re.ASCII) is None:
        raise PydanticCustomError("size", "must be WIDTHxHEIGHT, such as 1024x1024, or auto")
    return value


Text = Annotated[str, AfterValidator(_encodable)]
Size = Annotated[str, AfterValidator(_size), WithJsonSchema({"type": "string", "pattern": f"^{SIZE_PATTERN}$"})]
InputImages = Annotated[
    Pictures,
    PlainValidator(lambda value: _input_images(value)),
    PlainSerializer(lambda pictures: pictures),  # pydantic warns of each value that no validator of its own has seen
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def _with_extra_body(values: dict[str, Any]) -> dict[str, Any]:
    """The body with the fields of `extra_body` beside the others.

    People who copy the client's `extra_body` argument into raw HTTP send the fields nested.
    """
    extra = values.get("extra_body")
    if extra is None:
        return values
    if not isinstance(extra, dict):
        raise PydanticCustomError("extra_body", "extra_body must be an object: its fields are those of the body")
    twice = next((name for name in extra if values.get(name) is not None), None)
    if twice is not None:
        context = {"field": repr(twice)[1:-1][:80]}
        raise PydanticCustomError("extra_body", "extra_body: '{field}' is given twice", context)
    return {name: value for name, value in values.items() if name != "extra_body"} | extra


def _is_false(value: Any) -> bool:
    """As pydantic reads a form's text too."""
    return value is False or (isinstance(value, str) and value.lower() in ("false", "0", "no", "off", "f", "n"))


def _shown_name(name: object) -> str:
    return repr(name)[1:-1][:80]  # pydantic cannot hold lone surrogates


def _may_be_argument(name: object, known: list[str]) -> bool:
    return isinstance(name, str) and bool(_ARGUMENT.fullmatch(name)) and FIELD_INSTEAD.get(name) not in known


def closest(name: str, known: list[str]) -> str:
    """A hint for an unknown name."""
    if FIELD_INSTEAD.get(name) in known:
        return f"use {FIELD_INSTEAD[name]!r}"
    return did_you_mean(name, known, f"known are {', '.join(known)}")


def _with_nulls(schema: dict[str, Any]) -> None:
    """Any field that may be left out may be null."""
    for name, field in schema.get("properties", {}).items():
        if name in schema.get("required", ()) or {"type": "null"} in field.get("anyOf", ()):
            continue
        about = {word: field.pop(word) for word in ("title", "description", "default") if word in field}
        kinds = field.pop("anyOf", None) or [dict(field)]
        field.clear()
        field.update({"anyOf": [*kinds, {"type": "null"}], **about})


class GenerationBody(BaseModel):
    """What pictures, videos, sound and tensors are asked for with."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra=_with_nulls)

    media_kind: ClassVar[MediaKind]

    prompt: Text | None = Field(None, description="what to make; required by every model that reads text")
    model: str | None = Field(None, description="the served model's name, or NAME:LORA, see /v1/models")
    n: int = Field(
        1,
        ge=1,
        validation_alias=AliasChoices("n", "num_outputs_per_prompt"),
        description="how many; seeds count up from `seed`",
    )
    size: Size | None = Field(
        None,
        description="WIDTHxHEIGHT in pixels, or auto: the model's own, or that of the picture sent along",
    )
    safety_identifier: Text | None = Field(
        None, max_length=512, description="an id of your end user, repeated in the answer; no effect on the output"
    )
    user: Text | None = Field(None, max_length=512, description="OpenAI's earlier name of `safety_identifier`")
    seed: int | None = Field(None, ge=0, lt=2**62, description="same seed, same bytes; chosen if not given")
    negative_prompt: Text | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    true_cfg_scale: float | None = Field(None, ge=0)
    quality: Text | None = Field(
        None, max_length=64, description="a level that `quality` of the configuration maps to arguments; else no effect"
    )
    strength: float | None = Field(None, ge=0, le=1, description="how far to go from `image`")
    max_sequence_length: int | None = Field(None, ge=1, description="tokens of the prompt")
    mask_image: InputImages = Field(
        None,
        description="transparent where `image` is to be repainted; of a mask without alpha, what is white. Without a "
        "mask the alpha of `image` is one",
    )
    loras: LoRAs | None = Field(None, description="LoRAs for this request, each with its `scale`; /v1/loras lists them")
    cache_dit: dict[str, JsonValue] | None = Field(
        None, description="Cache-DiT for this request: `enable`, and knobs such as `residual_diff_threshold`"
    )
    enable_cache_dit: bool | None = Field(None, description="SGLang's name of `cache_dit.enable`")
    cache_dit_params: dict[str, JsonValue] | None = Field(None, description="SGLang's name of the knobs in `cache_dit`")
    webhook_url: Text | None = Field(
        None, max_length=2000, description="we POST a signed event to this URL when the job ends (jobs only)"
    )
    deterministic: bool = Field(False, description="its forwards run alone: same seed, same bytes under any load")
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="seconds after its arrival at the denoiser; the request with the earliest deadline runs first, "
        "after it the request fails",
    )
    extra_args: Annotated[dict[str, JsonValue], AfterValidator(_encodable)] = Field(
        default_factory=dict, description="further plain arguments of the pipeline's own call, by their names"
    )

    strict: bool = Field(
        True, description="false: a field without effect is dropped and named in `warnings`, and not refused"
    )
    # Fields that are none of these: arguments of the pipeline by their own names, if it has them.
    own_arguments: SkipJsonSchema[dict[str, Any]] = Field(default_factory=dict)
    # What was dropped, or means nothing here; not for callers.
    warnings: SkipJsonSchema[tuple[RequestWarning, ...]] = Field((), exclude=True)

    given_value = field_validator("*", mode="before")(classmethod(given_value))
    read_value = field_validator("*", mode="after")(staticmethod(read_value))

    @model_validator(mode="before")
    @classmethod
    def take_own_arguments(cls, values: Any) -> Any:
        """Fields that a pipeline may have are kept for it; no pipeline has those that have a field of another name.

        Raises a validation error of type `unknown_field`; without `strict` such fields are dropped. null stands for
        a field that is not sent.
        """
        if not isinstance(values, dict):
            return values
        values = _with_extra_body(values)
        known = cls.field_names()
        others = {name: value for name, value in values.items() if name not in known and value is not None}
        unknown = {name: closest(str(name), known) for name in others if not _may_be_argument(name, known)}
        for name, hint in unknown.items():
            if not _is_false(values.get("strict")):
                context = {"field": _shown_name(name), "hint": hint}
                raise PydanticCustomError("unknown_field", "unknown field '{field}': {hint}", context)
        dropped = tuple(
            RequestWarning("unknown_parameter", _shown_name(name), f"unknown field: {hint}")
            for name, hint in unknown.items()
        )
        given = {name: value for name, value in values.items() if name in known and value is not None}
        own = {name: value for name, value in others.items() if name not in unknown}
        return given | {"warnings": dropped} | ({"own_arguments": own} if own else {})

    def warn(self, param: str, message: str, code: str = "no_effect") -> None:
        """To be told in the answer."""
        self.warnings = (*self.warnings, RequestWarning(code, param, message))

    def drop(self, field: str, message: str) -> None:
        """The field is as if it was not sent, and the answer says that it has no effect."""
        self.warn(field, message)
        first, _, argument = field.partition(".")
        if field in self.own_arguments:
            self.own_arguments = {name: value for name, value in self.own_arguments.items() if name != field}
            return
        if argument:
            self.extra_args = {name: value for name, value in self.extra_args.items() if name != argument}
            return
        fields = type(self).model_fields
        name = next(name for name in fields if first in (name, *self.names_of(name)))
        setattr(self, name, fields[name].get_default(call_default_factory=True))

    def refuse(self, error: InvalidRequestError) -> None:
        """Raises the error of a field without effect; without `strict` the field is dropped instead."""
        if self.strict or error.param is None:
            raise error
        self.drop(error.param, error.message)

    @property
    def end_user(self) -> str | None:
        """The id of the end user: `user` counts where `safety_identifier` is missing or empty."""
        return self.safety_identifier or self.user or None

    @classmethod
    def field_names(cls) -> list[str]:
        return [spelling for name in cls.model_fields if name not in INSIDE for spelling in cls.names_of(name)]

    @classmethod
    def names_of(cls, name: str) -> list[str]:
        """The names that callers may give the field."""
        aliases = cls.model_fields[name].validation_alias
        return [str(alias) for alias in aliases.choices] if isinstance(aliases, AliasChoices) else [name]


class ImageGenerationBody(GenerationBody):
    """The body of POST /v1/images/generations: OpenAI's fields, and arguments of pipelines by their names."""

    media_kind: ClassVar[MediaKind] = "image"

    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="the file in the answer, or a URL of it; default for names that begin with dall-e: url"
    )
    output_format: Literal["png", "jpeg", "webp", "gif"] = Field(
        "png", description="gif, and webp with `frame_count`: a moving picture, of models that make video"
    )
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    bit_depth: Literal[8, 16] | None = Field(
        None, description="of each channel, 8 if not given; 16 with png: depth and other maps in fine steps"
    )
    frame_count: int | None = Field(None, ge=2, le=16, description="frames of a moving picture; 9 if not given")
    frame_duration_ms: int | None = Field(
        None, ge=10, le=655_350, description="how long each is shown, in steps of 10 ms; 200 if not given"
    )
    complexity: Literal["low", "medium", "high"] | None = Field(
        None, description="no effect: a diffusion model plans nothing before the picture"
    )
    svg: dict[str, JsonValue] | None = Field(None, description="refused: diffusion models make pixels")
    style: Text | None = Field(None, max_length=64, description="no effect: the prompt decides the style")
    background: bool | str | None = Field(
        None,
        description="true: answer with a job at once; transparent: keep the alpha that the model makes; opaque: lay "
        "the picture on white; auto: as the model makes it",
    )
    moderation: Text | None = Field(None, max_length=64, description="no effect: no filter is added to the model's own")
    stream: bool | None = Field(None, description="true: the answer is a stream of events")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=3,
        description="pictures to show on the way, in the stream or as events of the job; few models show none",
    )
    image: InputImages = Field(None, description="pictures to start from, as data URLs or base64")

    def model_post_init(self, _: Any) -> None:
        """Clients of DALL-E read the URL that its models answer with when nothing is said.

        No validator: one around the model keeps `allow_inf_nan` from the JSON in it, where FastAPI reads the body.
        """
        if "response_format" not in self.model_fields_set and (self.model or "").startswith("dall-e"):
            self.response_format = "b64_json" if self.stream else "url"


class VideoGenerationBody(GenerationBody):
    """The body that a video is asked for with."""

    media_kind: ClassVar[MediaKind] = "video"

    response_format: Literal["b64_json", "url"] = Field("url", description="a URL of the file, or the file itself")
    output_format: Literal["mp4", "webp", "gif"] = Field("mp4", description="webp and gif: moving pictures, no sound")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of webp")
    seconds: float | None = Field(None, gt=0, description="length; frames = seconds x fps; not with num_frames")
    num_frames: int | None = Field(None, ge=1, description="the model may round it to what its VAE can pack")
    fps: float | None = Field(None, gt=0, le=240, description="frames per second; default: the model's own")
    guidance_scale_2: float | None = Field(None, ge=0, description="of the second denoiser, where there are two")
    image: InputImages = Field(
        None,
        validation_alias=AliasChoices("image", "input_reference"),
        description="the picture that the video starts from, as a data URL or base64",
    )
    last_image: InputImages = Field(None, description="the picture that the video ends with")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="first frames to show on the way, as events of the job; some models show none"
    )


class AudioGenerationBody(GenerationBody):
    """The body of POST /v1/audio/generations."""

    media_kind: ClassVar[MediaKind] = "audio"

    response_format: Literal["b64_json", "url"] = Field("b64_json", description="the file in the answer, or its URL")
    output_format: Literal["wav", "flac", "mp3"] = Field("wav", description="wav and flac: 16 bits, without loss")
    seconds: float | None = Field(
        None,
        gt=0,
        validation_alias=AliasChoices("seconds", "duration"),
        description="length, for the pipeline's own argument of it; default: the model's own",
    )


class TensorsGenerationBody(GenerationBody):
    """The body of POST /v1/tensors/generations, of models whose product are numbers, such as a prior's embeddings."""

    media_kind: ClassVar[MediaKind] = "tensors"

    response_format: Literal["b64_json", "url"] = Field("b64_json", description="the file in the answer, or its URL")
    output_format: Literal["safetensors"] = Field("safetensors", description="the tensors by the output's field names")
    image: InputImages = Field(None, description="pictures that the model embeds, as data URLs or base64")


MediaBody = ImageGenerationBody | VideoGenerationBody | AudioGenerationBody | TensorsGenerationBody
