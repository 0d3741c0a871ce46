"""The bodies that callers send, in OpenAI's words and ours, and the answers; bodies become requests here.

A field is either passed on to the pipeline's own `__call__` or refused: nothing is silently ignored. The few
fields of OpenAI's that mean nothing to a diffusion model are accepted with the values that ask for nothing.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic.functional_validators import AfterValidator, PlainValidator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.errors import InvalidRequestError, ModelNotFoundError, NotSupportedError
from deployments.messages import (
    GenerationRequest,
    InputImage,
    Media,
    MediaKind,
    OutputFormat,
    StageDescription,
)
from serve_app.limits import RequestLimits

T = TypeVar("T")

DEFAULT_FPS = 16.0  # turns `seconds` into frames where neither the caller nor the pipeline has a rate
SEED_BITS = 32  # of a seed that we choose: short enough to be written down

# Values of OpenAI's fields that ask for nothing that a diffusion model would have to do.
NO_REQUEST: dict[str, tuple[Any, ...]] = {
    "quality": (None, "auto", "standard"),
    "style": (None, "auto"),
    "background": (None, "auto", "opaque", True, False, "true", "false"),  # true asks for a job
    "moderation": (None, "auto", "low"),
    "stream": (None, False),
}

# Passed on under the same name when they are set.
ARGUMENT_FIELDS = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "true_cfg_scale",
    "strength",
    "max_sequence_length",
    "image",
    "mask_image",
    "last_image",
    "video",
)

# Names that people try, and what is meant; also arguments of pipelines that have a field of another name.
FIELD_INSTEAD = {
    "width": "size",
    "height": "size",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "num_images": "n",
    "num_images_per_prompt": "n",
    "num_videos_per_prompt": "n",
    "frame_rate": "fps",
}
SIZE_PATTERN = r"(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})"
RATE_ARGUMENTS = ("frame_rate", "fps")  # pipelines have one of them or neither
_NO_JSON = re.compile(r"latents|embeds|embeddings|attention_mask|callback|generator|processor")

_IMAGE_SIGNATURES = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)


@dataclass(frozen=True)
class RemoteImage:
    """A picture to be fetched before the request is made: serve_app.remote_images."""

    url: str


def _input_image(value: Any) -> InputImage | RemoteImage:
    """From a data URL, base64, a URL, OpenAI's {"image_url": ...}, or the bytes of an uploaded file."""
    if isinstance(value, dict):
        value = value.get("image_url")
    if isinstance(value, str):
        if re.match(r"https?:", value):
            return RemoteImage(value)
        try:
            encoded = value.partition(",")[2] if value.startswith("data:") else value
            value = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise PydanticCustomError("input_image", "a picture must be a data URL or base64") from error
    if isinstance(value, InputImage):
        return value
    if not isinstance(value, bytes) or not _IMAGE_SIGNATURES.match(value):
        raise PydanticCustomError("input_image", "a picture must be a PNG, JPEG or WebP file")
    return InputImage(value)


Picture = InputImage | RemoteImage


def _input_images(value: Any) -> Picture | list[Picture] | None:
    if value is None:
        return None
    if isinstance(value, list):
        images = [_input_image(item) for item in value]
        return images[0] if len(images) == 1 else images
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
    Picture | list[Picture] | None,
    PlainValidator(_input_images),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def _with_extra_body(values: dict[str, Any]) -> dict[str, Any]:
    """The body with the fields of `extra_body` beside the others: who writes HTTP by hand after the OpenAI client's
    argument of this name sends them nested."""
    extra = values.get("extra_body")
    if extra is None:
        return values
    if not isinstance(extra, dict):
        raise PydanticCustomError("extra_body", "extra_body must be an object: its fields are those of the body")
    twice = next((name for name in extra if name in values), None)
    if twice is not None:
        context = {"field": repr(twice)[1:-1][:80]}
        raise PydanticCustomError("extra_body", "extra_body: '{field}' is given twice", context)
    return {name: value for name, value in values.items() if name != "extra_body"} | extra


class GenerationBody(BaseModel):
    """What pictures and videos are asked for with."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    media_kind: ClassVar[MediaKind]

    prompt: Text | None = Field(None, description="what to make; required by every model that reads text")
    model: str | None = Field(None, description="the served model's name, see /v1/models")
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
    user: str | None = Field(None, max_length=512, description="an id of your end user; no effect on the output")
    seed: int | None = Field(None, ge=0, lt=2**62, description="same seed, same bytes; chosen if not given")
    negative_prompt: Text | None = None
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=0)
    true_cfg_scale: float | None = Field(None, ge=0)
    strength: float | None = Field(None, ge=0, le=1, description="how far to go from `image`")
    max_sequence_length: int | None = Field(None, ge=1, description="tokens of the prompt")
    mask_image: InputImages = Field(None, description="white where `image` is to be repainted")
    cache_dit: dict[str, JsonValue] | None = Field(
        None, description="Cache-DiT for this request: `enable`, and knobs such as `residual_diff_threshold`"
    )
    enable_cache_dit: bool | None = Field(None, description="SGLang's name of `cache_dit.enable`")
    cache_dit_params: dict[str, JsonValue] | None = Field(None, description="SGLang's name of the knobs in `cache_dit`")
    webhook_url: Text | None = Field(
        None, max_length=2000, description="the end of a job is told there in a signed POST; for jobs only"
    )
    deterministic: bool = Field(False, description="its forwards run alone: same seed, same bytes under any load")
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="seconds after its arrival at the denoiser; who has least time to spare goes first, and past it "
        "the request ends with an error",
    )
    extra_args: Annotated[dict[str, JsonValue], AfterValidator(_encodable)] = Field(
        default_factory=dict, description="further plain arguments of the pipeline's own call, by their names"
    )

    @model_validator(mode="before")
    @classmethod
    def name_the_closest_field(cls, values: Any) -> Any:
        """Raises a validation error of type `unknown_field`."""
        if isinstance(values, dict):
            values = _with_extra_body(values)
            known = cls.field_names()
            for name in values:
                if name not in known:
                    hint = closest(str(name), known)
                    hint += " (other arguments of the pipeline go into 'extra_args')"
                    shown = repr(name)[1:-1][:80]  # pydantic cannot hold lone surrogates
                    context = {"field": shown, "hint": hint}
                    raise PydanticCustomError("unknown_field", "unknown field '{field}': {hint}", context)
        return values

    @classmethod
    def field_names(cls) -> list[str]:
        names = []
        for name, field in cls.model_fields.items():
            aliases = field.validation_alias
            names += [str(alias) for alias in aliases.choices] if isinstance(aliases, AliasChoices) else [name]
        return names


class ImageGenerationBody(GenerationBody):
    """The body of POST /v1/images/generations: OpenAI's fields, and arguments of pipelines by their names."""

    media_kind: ClassVar[MediaKind] = "image"

    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="the file in the answer (as OpenAI's newer models answer), or a URL of it"
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    quality: str | None = Field(None, description="auto or standard: steps decide the quality of a diffusion model")
    style: str | None = Field(None, description="auto: the prompt decides the style")
    background: bool | str | None = Field(
        None, description="true: answer with a job at once; auto or opaque: the model decides what it paints"
    )
    moderation: str | None = Field(None, description="auto or low: no filter is added to the model's own")
    stream: bool | None = Field(None, description="true: the answer is a stream of events")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=3,
        description="pictures to show on the way, in the stream or as events of the job; few models show none",
    )
    image: InputImages = Field(None, description="pictures to start from, as data URLs or base64")


class VideoGenerationBody(GenerationBody):
    """The body that a video is asked for with."""

    media_kind: ClassVar[MediaKind] = "video"

    response_format: Literal["b64_json", "url"] = Field("url", description="a URL of the file, or the file itself")
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


class GeneratedItem(BaseModel):
    """One file: its bytes or where they are."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: None = None
    seed: int


class ImagesAnswer(BaseModel):
    """What the OpenAI client reads as ImagesResponse, and a little more."""

    created: int  # Unix time in seconds
    model: str
    data: list[GeneratedItem]
    output_format: str
    size: str
    timings: list[dict[str, float]] = Field(description="seconds of each part, for each of the n")

    @classmethod
    def of(cls, items: list[GeneratedItem], requests: list[GenerationRequest], media: list[Media]) -> Self:
        first = media[0].files[0]
        return cls(
            created=int(time.time()),
            model=requests[0].model,
            data=items,
            output_format=requests[0].output.format,
            size=f"{first.width}x{first.height}",
            timings=[made.seconds for made in media],
        )


class VideosAnswer(ImagesAnswer):
    """The same for videos, with their length."""

    num_frames: int
    fps: float | None

    @classmethod
    def of(cls, items: list[GeneratedItem], requests: list[GenerationRequest], media: list[Media]) -> Self:
        first = media[0].files[0]
        answer = ImagesAnswer.of(items, requests, media)
        return cls(**dict(answer), num_frames=first.num_frames, fps=first.fps)


class ModelCard(BaseModel):
    """A served model, as OpenAI lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int  # Unix time in seconds
    owned_by: str = "triptych"


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def to_generation_requests(
    body: ImageGenerationBody | VideoGenerationBody,
    description: StageDescription,
    limits: RequestLimits,
    request_id: str,
    model_name: str,
    default_arguments: dict[str, Any] | None = None,
) -> list[GenerationRequest]:
    """The `n` requests that a body stands for, with the seeds seed, seed + 1 ...

    Arguments are those of the body over `default_arguments`; what neither says is left to the pipeline's own
    defaults. With n > 1 the ids are `request_id`-0, `request_id`-1 ...
    Raises ModelNotFoundError, NotSupportedError or InvalidRequestError, with the field in `param`.
    """
    if body.model not in (None, model_name):
        raise ModelNotFoundError(f"the model {body.model!r} is not served here, {model_name!r} is")
    if body.media_kind != description.media_kind:
        raise NotSupportedError(
            f"{model_name!r} ({description.pipeline_class}) makes {description.media_kind}s, "
            f"it cannot make {body.media_kind}s",
            "model",
        )
    _refuse_requests_without_effect(body)
    if body.n > limits.max_images:
        raise _above("n", body.n, limits.max_images)
    defaults = dict(default_arguments or {})
    steps = description.parameters.get("num_inference_steps")
    if steps is not None:  # said explicitly, so that the file can say it
        defaults.setdefault("num_inference_steps", steps)
    arguments = defaults | _arguments(body, description, limits)
    if isinstance(body, ImageGenerationBody):
        output = _picture_output(body)
    else:
        model_fps = _model_fps(description, defaults)
        arguments |= _length_arguments(body, description, limits, model_fps)
        output = _video_output(body, model_fps)
    _check_required(arguments, description)
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
    ids = [request_id] if body.n == 1 else [f"{request_id}-{index}" for index in range(body.n)]
    cache_dit = _cache_dit(body)
    return [
        GenerationRequest(
            id,
            model_name,
            dict(arguments),
            seed + index,
            output,
            deterministic=body.deterministic,
            deadline_s=body.deadline_s,
            cache_dit=cache_dit,
            previews=body.partial_images or 0,
        )
        for index, id in enumerate(ids)
    ]


def _refuse_requests_without_effect(body: GenerationBody) -> None:
    for name, harmless in NO_REQUEST.items():
        value = getattr(body, name, None)
        if value not in harmless:
            allowed = " or ".join(repr(choice) for choice in harmless if choice is not None)
            raise NotSupportedError(f"{name}={_shown(value)} is not supported, only {allowed}", name)


def _cache_dit(body: GenerationBody) -> dict[str, Any] | None:
    """What the request says of Cache-DiT, in our words; the denoiser checks the knobs."""
    if body.enable_cache_dit is None and body.cache_dit_params is None:
        return body.cache_dit
    if body.cache_dit is not None:
        given = "enable_cache_dit" if body.enable_cache_dit is not None else "cache_dit_params"
        raise InvalidRequestError(f"give cache_dit or {given}, not both", given)
    enable = {} if body.enable_cache_dit is None else {"enable": body.enable_cache_dit}
    return {**(body.cache_dit_params or {}), **enable}


def _arguments(body: GenerationBody, description: StageDescription, limits: RequestLimits) -> dict[str, Any]:
    """The arguments that the caller set, checked."""
    arguments = _extra_arguments(body, description, limits)
    for name in ARGUMENT_FIELDS:
        value = getattr(body, name, None)
        if value is None:
            continue
        _check_accepted(name, name, description)
        if isinstance(value, str) and len(value) > limits.max_prompt_chars:
            raise _above(name, len(value), limits.max_prompt_chars, " characters")
        if isinstance(value, list) and name != "video" and len(value) > limits.max_input_images:
            raise _above(name, len(value), limits.max_input_images, " pictures")
        if any(isinstance(each, RemoteImage) for each in (value if isinstance(value, list) else [value])):
            raise NotSupportedError(f"{name}: pictures are not fetched from a URL here", name)
        arguments[name] = value
    if "prompt" in description.parameters and not (body.prompt or "").strip():
        raise InvalidRequestError("prompt is required and must not be empty", "prompt", "missing_required_parameter")
    if body.num_inference_steps is not None and body.num_inference_steps > limits.max_steps:
        raise _above("num_inference_steps", body.num_inference_steps, limits.max_steps)
    if body.size not in (None, "auto"):
        _check_accepted("size", "width", description)
        arguments |= _width_and_height(str(body.size), description, limits)
    return arguments


def _width_and_height(size: str, description: StageDescription, limits: RequestLimits) -> dict[str, int]:
    sides = dict(zip(("width", "height"), map(int, size.split("x")), strict=True))
    multiple = description.size_multiple
    for name, value in sides.items():
        if value > limits.max_side:
            raise _above("size", value, limits.max_side, f" pixels of {name}")
        if value % multiple:
            below = value - value % multiple
            nearest = " or ".join(str(side) for side in (below, below + multiple) if side)
            raise InvalidRequestError(
                f"size: {name} must be a multiple of {multiple}, got {value}; the nearest are {nearest}",
                "size",
            )
    pixels = sides["width"] * sides["height"]
    if pixels > limits.max_pixels:
        raise _above("size", pixels, limits.max_pixels, " pixels (width x height)")
    return sides


def _picture_output(body: ImageGenerationBody) -> OutputFormat:
    if body.output_compression is not None and body.output_format == "png":
        raise NotSupportedError("output_compression is for jpeg and webp, png is lossless", "output_compression")
    return OutputFormat("image", body.output_format, body.output_compression)


def _video_output(body: VideoGenerationBody, model_fps: float | None) -> OutputFormat:
    fps = body.fps or model_fps
    return OutputFormat("video", "mp4", fps=None if fps is None else float(fps))


def _length_arguments(
    body: VideoGenerationBody, description: StageDescription, limits: RequestLimits, model_fps: float | None
) -> dict[str, Any]:
    """The arguments that make a video as long as asked; the rate too, where the model conditions on it."""
    arguments: dict[str, Any] = {}
    if body.fps is not None:
        rate = int(body.fps) if body.fps.is_integer() else body.fps  # some pipelines ask for an int
        arguments |= {name: rate for name in RATE_ARGUMENTS if name in description.parameters}
    field, num_frames = "num_frames", body.num_frames
    if body.seconds is not None:
        if num_frames is not None:
            raise InvalidRequestError("give seconds or num_frames, not both", "seconds")
        field, num_frames = "seconds", max(1, round(body.seconds * (body.fps or model_fps or DEFAULT_FPS)))
    if num_frames is not None:
        _check_accepted(field, "num_frames", description)
        if num_frames > limits.max_frames:
            raise _above(field, num_frames, limits.max_frames, " frames")
        arguments["num_frames"] = num_frames
    return arguments


def _model_fps(description: StageDescription, defaults: dict[str, Any]) -> float | None:
    rates = [arguments.get(name) for arguments in (defaults, description.parameters) for name in RATE_ARGUMENTS]
    return next((float(rate) for rate in rates if rate), None)


def _extra_arguments(body: GenerationBody, description: StageDescription, limits: RequestLimits) -> dict[str, Any]:
    known = [*body.field_names(), *FIELD_INSTEAD]
    for name, value in body.extra_args.items():
        param = f"extra_args.{name[:80]}"
        if name in known:
            raise InvalidRequestError(f"{param}: use the field {FIELD_INSTEAD.get(name, name)!r}", param)
        if _NO_JSON.search(name):
            raise NotSupportedError(f"{param} does not take a plain value, so it cannot be sent as JSON", param)
        if name not in description.parameters:
            hint = closest(name, [each for each in description.parameters if each not in known])
            raise NotSupportedError(f"{description.pipeline_class} has no argument {name[:80]!r}: {hint}", param)
        _check_extra_value(param, value, description.parameters[name], limits)
    return dict(body.extra_args)


_TYPES_LIKE: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int, float, list), "a number"),
    float: ((int, float, list), "a number"),
    str: ((str, list), "a text"),
}


def _check_extra_value(param: str, value: Any, default: Any, limits: RequestLimits) -> None:
    types, needed = _TYPES_LIKE.get(type(default), ((object,), ""))
    if not isinstance(value, types) or (isinstance(value, bool) and type(default) in (int, float)):
        raise InvalidRequestError(f"{param} must be {needed}, got {_shown(value)}", param)
    if "num_inference_steps" in param and isinstance(value, int | float) and not 1 <= value <= limits.max_steps:
        raise InvalidRequestError(f"{param} must be between 1 and {limits.max_steps}, got {value}", param)
    if isinstance(value, str) and len(value) > limits.max_prompt_chars:
        raise _above(param, len(value), limits.max_prompt_chars, " characters")
    if isinstance(value, list) and len(value) > limits.max_steps:
        raise _above(param, len(value), limits.max_steps, " entries")


def _check_accepted(field: str, argument: str, description: StageDescription) -> None:
    if argument not in description.parameters and argument not in description.required:
        raise NotSupportedError(f"{field} is not supported: {description.pipeline_class} does not take it", field)


def _check_required(arguments: dict[str, Any], description: StageDescription) -> None:
    for name in description.required:
        if arguments.get(name) is None:
            field = FIELD_INSTEAD.get(name, name)
            raise InvalidRequestError(
                f"{field} is required by {description.pipeline_class}", field, "missing_required_parameter"
            )


def _above(field: str, value: int, limit: int, unit: str = "") -> InvalidRequestError:
    return InvalidRequestError(f"{field}: at most {limit}{unit}, got {value}", field, "limit_exceeded")


def closest(name: str, known: list[str]) -> str:
    """A hint for an unknown name."""
    if FIELD_INSTEAD.get(name) in known:
        return f"use {FIELD_INSTEAD[name]!r}"
    close = difflib.get_close_matches(name[:80], known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
