"""Translates a request body into one GenerationRequest per file to make, checked against the model and the limits.

A field is either passed on to the pipeline's own `__call__` or refused: nothing is silently ignored. The few
fields of OpenAI's that mean nothing to a diffusion model are accepted, and named in `warnings`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.errors import InvalidRequestError, ModelNotFoundError, NotSupportedError
from deployments.messages import GenerationRequest, OutputFormat, RequestWarning, StageDescription
from serve_app.requests.argument_values import above, argument_value, check_text, shown, takes_one_picture
from serve_app.requests.bodies import (
    FIELD_INSTEAD,
    AudioGenerationBody,
    GenerationBody,
    ImageGenerationBody,
    MediaBody,
    VideoGenerationBody,
    closest,
)
from serve_app.requests.given.references import EarlierOutput, RemoteFile
from serve_app.requests.limits import RequestLimits
from serve_app.requests.loras import FIELD, refuse_scale_of_all
from serve_app.requests.outputs import animation_output, asks_for_frames, check_kind, picture_output, video_output

DEFAULT_FPS = 16.0  # turns `seconds` into frames where neither the caller nor the pipeline has a rate
MOST_FRAMES = 1e12  # beyond every limit, and still a number that can be said
SEED_BITS = 32  # of a seed that we choose: short enough to be written down

Levels = dict[str, dict[str, Any]]  # of `quality`: arguments of the pipeline by level

# Values of OpenAI's fields that ask for nothing that a diffusion model would have to do.
NO_REQUEST: dict[str, tuple[Any, ...]] = {
    "background": (None, "auto", "opaque", "transparent", True, False, "true", "false"),  # true asks for a job
}

# OpenAI's fields that mean nothing here, and why: clients send them to every server, so they are no fault.
MEANINGLESS = {
    "style": "the prompt decides the style",
    "moderation": "no filter is added to the model's own",
    "complexity": "a diffusion model plans nothing before the picture",
    "input_fidelity": "the model decides how close it stays to the pictures",
}

# OpenAI's fields that no diffusion model can answer, and what to do instead.
REFUSED = {
    "svg": "diffusion models make pixels: ask for png, jpeg or webp",
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

# Fields that stand for arguments of the pipeline.
OF_ARGUMENTS = (*ARGUMENT_FIELDS, "size", "num_frames", "seconds", "fps", "frame_count", "extra_args")

RATE_ARGUMENTS = ("frame_rate", "fps")  # pipelines have one of them or neither


def to_generation_requests(
    body: MediaBody,
    description: StageDescription,
    limits: RequestLimits,
    request_id: str,
    model_name: str,
    default_arguments: dict[str, Any] | None = None,
    quality: Levels | None = None,
    loras: Sequence[dict[str, Any]] = (),
) -> list[GenerationRequest]:
    """The `n` requests that a body stands for, with the seeds seed, seed + 1 ...

    Arguments are those of the body over those of its level of `quality` over `default_arguments`; what none says is
    left to the pipeline's own defaults. With n > 1 the ids are `request_id`-0, `request_id`-1 ... `loras`: those that
    the body names, as the stages read them.
    Raises ModelNotFoundError, NotSupportedError or InvalidRequestError, with the field in `param`.
    """
    if body.model not in (None, model_name):
        raise ModelNotFoundError(f"the model {body.model!r} is not served here, {model_name!r} is")
    is_animation = isinstance(body, ImageGenerationBody) and asks_for_frames(body)
    if is_animation and description.media_kind == "image":
        field = "frame_count" if body.output_format != "gif" else "output_format"
        raise NotSupportedError(
            f"{field} is not supported: a moving picture needs a model that makes video, "
            f"{description.pipeline_class} makes single pictures",
            field,
        )
    check_kind("video" if is_animation else body.media_kind, description)
    refuse_scale_of_all(body.own_arguments | body.extra_args)
    _refuse_requests_without_effect(body)
    _name_what_means_nothing(body)
    if body.n > limits.max_images:
        raise above("n", body.n, limits.max_images)
    defaults = dict(default_arguments or {}) | _of_quality(body, quality or {})
    steps = description.parameters.get("num_inference_steps")
    if steps is not None:  # said explicitly, so that the file can say it
        defaults.setdefault("num_inference_steps", steps)
    arguments = defaults | _arguments(body, description, limits)
    if isinstance(body, ImageGenerationBody):
        output = animation_output(body) if is_animation else picture_output(body, description)
        if is_animation:
            arguments |= _animation_arguments(body, output, description, limits)
    elif isinstance(body, VideoGenerationBody):
        model_fps = _model_fps(description, defaults)
        arguments |= _length_arguments(body, description, limits, model_fps)
        output = video_output(body, model_fps)
    elif isinstance(body, AudioGenerationBody):
        arguments |= _sound_arguments(body, arguments, description, limits)
        output = OutputFormat("audio", body.output_format)
    else:
        output = OutputFormat("tensors", body.output_format)
    check_required(arguments, description)
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
    ids = [request_id] if body.n == 1 else [f"{request_id}-{index}" for index in range(body.n)]
    features = _features(body, description) | ({FIELD: list(loras)} if loras else {})
    return [
        GenerationRequest(
            id,
            model_name,
            dict(arguments),
            seed + index,
            output,
            deterministic=body.deterministic,
            deadline_s=body.deadline_s,
            features=dict(features),
            warnings=body.warnings,
            left_out=left_out(body),
        )
        for index, id in enumerate(ids)
    ]


def _refuse_requests_without_effect(body: GenerationBody) -> None:
    for name, harmless in NO_REQUEST.items():
        value = getattr(body, name, None)
        if value not in harmless:
            allowed = " or ".join(repr(choice) for choice in harmless if choice is not None)
            raise NotSupportedError(f"{name}={shown(value)} is not supported, only {allowed}", name)
    for name, instead in REFUSED.items():
        if getattr(body, name, None) is not None:
            raise NotSupportedError(f"{name} is not supported: {instead}", name)


def asked_arguments(body: GenerationBody, description: StageDescription) -> dict[str, str]:
    """The pipeline's arguments that the caller set, with the field of each; but for those that always matter."""
    asked = {
        name: body.names_of(name)[0]
        for name in ARGUMENT_FIELDS
        if name not in ("prompt", "video") and getattr(body, name, None) is not None
    }
    if body.size not in (None, "auto"):
        asked |= {"width": "size", "height": "size"}
    for field in ("num_frames", "seconds"):
        if getattr(body, field, None) is not None:
            asked[description.length_argument or "num_frames"] = field
    asked |= {name: param for param, name, _ in _given(body, description)}
    return {name: field for name, field in asked.items() if name in description.parameters}


def left_out(body: GenerationBody) -> tuple[RequestWarning, ...]:
    """The warnings about arguments of the pipeline that were dropped."""
    fields = {
        spelling
        for name in OF_ARGUMENTS
        if name in type(body).model_fields
        for spelling in (name, *body.names_of(name))
    }
    others = set(body.field_names()) - fields
    return tuple(
        warning
        for warning in body.warnings
        if warning.code == "no_effect" and str(warning.param).partition(".")[0] not in others
    )


def sendable_arguments(body: type[GenerationBody], description: StageDescription) -> dict[str, str]:
    """Every argument of the pipeline that a request can set, with the field of the body that sets it.

    That is its own name, but for those that OpenAI and other servers call otherwise.
    """
    known = body.field_names()
    fields = {}
    for name in description.parameters:
        if name in FIELD_INSTEAD:
            fields[name] = FIELD_INSTEAD[name]
        elif name in known or not description.notes_of(name).why_not:
            fields[name] = name
    return {name: field for name, field in fields.items() if field != "n"}


def _name_what_means_nothing(body: GenerationBody) -> None:
    for name, why in MEANINGLESS.items():
        if getattr(body, name, None) is not None:
            body.drop(name, f"{name} has no effect: {why}")


def _of_quality(body: GenerationBody, levels: Levels) -> dict[str, Any]:
    """The arguments of the level that was asked for; one that nobody configured is the model's own."""
    level = getattr(body, "quality", None)
    if level is None or level in levels or (levels and level == "auto"):
        return levels.get(level or "auto", {})
    known = f"levels are {', '.join(levels)}" if levels else "no levels are configured"
    body.drop("quality", f"quality={shown(level)} has no effect: {known}; num_inference_steps decides the quality")
    return {}


def _features(body: GenerationBody, description: StageDescription) -> dict[str, Any]:
    """What the request asks of features, by their names; the denoiser checks the values.

    A feature that has no field of its own is asked for by its name, or in `extra_args`.
    """
    asked = body.extra_args | body.own_arguments
    own_fields = body.field_names()
    features = {name: value for name, value in asked.items() if name in description.features and name not in own_fields}
    cache_dit = _cache_dit(body)
    return features if cache_dit is None else {**features, "cache_dit": cache_dit}


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
        if value is None or not _is_accepted(body, name, name, description):
            continue
        if isinstance(value, str):
            check_text(name, value, limits)
        if isinstance(value, list) and name != "video":
            check_pictures(name, value, description, limits)
        if _holds_reference(value):
            raise NotSupportedError(f"{name}: files are not fetched here", name)
        is_number = isinstance(value, int | float)  # words and pictures have the types that their fields give them
        arguments[name] = argument_value(name, value, description.type_of(name), limits) if is_number else value
    if "prompt" in description.parameters and not (body.prompt or "").strip():
        raise InvalidRequestError("prompt is required and must not be empty", "prompt", "missing_required_parameter")
    if body.num_inference_steps is not None:
        check_steps("num_inference_steps", body.num_inference_steps, limits)
    if body.max_sequence_length is not None and body.max_sequence_length > limits.max_prompt_tokens:
        raise above("max_sequence_length", body.max_sequence_length, limits.max_prompt_tokens, " tokens")
    if body.size not in (None, "auto") and _is_accepted(body, "size", "width", description):
        arguments |= _width_and_height(str(body.size), description, limits)
    return arguments


def _holds_reference(value: Any) -> bool:
    return isinstance(value, RemoteFile | EarlierOutput) or (
        isinstance(value, list) and any(map(_holds_reference, value))
    )


def check_pictures(name: str, value: list[Any], description: StageDescription, limits: RequestLimits) -> None:
    """How many. Raises InvalidRequestError."""
    if len(value) > limits.max_input_images:
        raise above(name, len(value), limits.max_input_images, " pictures")
    if takes_one_picture(description.type_of(name)):
        raise InvalidRequestError(f"{name}: {description.pipeline_class} takes one picture, got {len(value)}", name)


def _width_and_height(size: str, description: StageDescription, limits: RequestLimits) -> dict[str, int]:
    sides = dict(zip(("width", "height"), map(int, size.split("x")), strict=True))
    check_sides(sides, description, limits)
    return sides


def check_sides(sides: Mapping[str, int], description: StageDescription, limits: RequestLimits) -> None:
    """`sides` by "width" and "height", of which one may be missing. Raises InvalidRequestError."""
    multiple = description.size_multiple
    for name, value in sides.items():
        if value > limits.max_side:
            raise above("size", value, limits.max_side, f" pixels of {name}")
        if value % multiple:
            below = value - value % multiple
            nearest = " or ".join(str(side) for side in (below, below + multiple) if side)
            raise InvalidRequestError(
                f"size: {name} must be a multiple of {multiple}, got {value}; the nearest are {nearest}",
                "size",
            )
    pixels = math.prod(sides.values())
    if pixels > limits.max_pixels:
        raise above("size", pixels, limits.max_pixels, " pixels (width x height)")


def _animation_arguments(
    body: GenerationBody, output: OutputFormat, description: StageDescription, limits: RequestLimits
) -> dict[str, Any]:
    """As many frames as the model can make at least, where it makes one and a multiple of some number."""
    assert output.max_frames is not None
    if not _is_accepted(body, "frame_count", "num_frames", description):
        return {}
    _refuse_given(body, "num_frames", "frame_count")
    multiple = description.frame_multiple
    num_frames = 1 + -(-(output.max_frames - 1) // multiple) * multiple
    if num_frames > limits.max_frames:
        raise above("frame_count", num_frames, limits.max_frames, " frames")
    return {"num_frames": num_frames}


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
        frames = min(body.seconds * (body.fps or model_fps or DEFAULT_FPS), MOST_FRAMES)
        field, num_frames = "seconds", max(1, round(frames))
    if num_frames is not None and _is_accepted(body, field, "num_frames", description):
        if num_frames > limits.max_frames:
            raise above(field, num_frames, limits.max_frames, " frames")
        arguments["num_frames"] = argument_value(field, num_frames, description.type_of("num_frames"), limits)
    return arguments


def _sound_arguments(
    body: AudioGenerationBody, arguments: dict[str, Any], description: StageDescription, limits: RequestLimits
) -> dict[str, Any]:
    """The argument that makes a sound as long as asked, under the pipeline's own name of it."""
    name = description.length_argument
    if name is None:
        if body.seconds is not None:
            reason = f"seconds is not supported: {description.pipeline_class} has no argument for the length"
            body.refuse(NotSupportedError(reason, "seconds"))
        return {}
    if body.seconds is None:
        check_length(name, arguments.get(name), limits)
        return {}
    _refuse_given(body, name, "seconds")
    check_length("seconds", body.seconds, limits)
    # Where the pipeline asks for the end, the sound is as long as was asked from where it starts.
    start = arguments.get(name.replace("_end", "_start")) or 0 if "_end" in name else 0
    return {name: body.seconds + start}


def _refuse_given(body: GenerationBody, argument: str, field: str) -> None:
    """Raises InvalidRequestError where the caller set the argument that the field sets."""
    if argument in body.extra_args or argument in body.own_arguments:
        raise InvalidRequestError(f"give {field} or {argument}, not both", field)


def check_length(field: str, seconds: Any, limits: RequestLimits) -> None:
    """Of a sound. Raises InvalidRequestError."""
    if isinstance(seconds, int | float) and seconds > limits.max_audio_seconds:
        raise above(field, seconds, limits.max_audio_seconds, " seconds")


def _model_fps(description: StageDescription, defaults: dict[str, Any]) -> float | None:
    rates = [arguments.get(name) for arguments in (defaults, description.parameters) for name in RATE_ARGUMENTS]
    return next((float(rate) for rate in rates if rate), None)


def _given(body: GenerationBody, description: StageDescription) -> list[tuple[str, str, Any]]:
    """What is asked for under the pipeline's own names: the field, the argument and the value."""
    known = [*body.field_names(), *FIELD_INSTEAD]
    extra = {name: value for name, value in body.extra_args.items() if name not in {*description.features} - {*known}}
    own = [(name, name, value) for name, value in body.own_arguments.items() if name not in description.features]
    return [*own, *((f"extra_args.{name[:80]}", name, value) for name, value in extra.items())]


def _extra_arguments(body: GenerationBody, description: StageDescription, limits: RequestLimits) -> dict[str, Any]:
    known = [*body.field_names(), *FIELD_INSTEAD]
    arguments: dict[str, Any] = {}
    for param, name, value in _given(body, description):
        if name in known and param != name:
            raise InvalidRequestError(f"{param}: use the field {FIELD_INSTEAD.get(name, name)!r}", param)
        if name in arguments:
            raise InvalidRequestError(f"{param} is given twice, also as {name}", param)
        if why := description.notes_of(name).why_not:
            raise NotSupportedError(f"{param} cannot be sent: {why}", param)
        if name not in description.parameters and param == name:
            _refuse_unknown(body, name, description)
            continue
        if name not in description.parameters:
            hint = closest(name, [each for each in description.parameters if each not in known])
            reason = f"{description.pipeline_class} has no argument {name[:80]!r}: {hint}"
            body.refuse(NotSupportedError(reason, f"extra_args.{name}" if not body.strict else param))
            continue
        value = argument_value(param, value, description.type_of(name), limits)
        if "num_inference_steps" in name:
            check_steps(param, value, limits)
        if value is not None or description.parameters[name] is not None:  # null stands for a default that is None
            arguments[name] = value
    return arguments


def _refuse_unknown(body: GenerationBody, name: str, description: StageDescription) -> None:
    """Raises NotSupportedError; without `strict` the field is dropped instead."""
    sendable = [each for each in description.parameters if not description.notes_of(each).why_not]
    fields = dict.fromkeys([*body.field_names(), *sendable])
    message = f"unknown field {name!r}: {closest(name, [each for each in fields if each not in FIELD_INSTEAD])}"
    if body.strict:
        raise NotSupportedError(message, name, "unknown_parameter")
    body.own_arguments = {other: value for other, value in body.own_arguments.items() if other != name}
    body.warn(name, message, "unknown_parameter")


def check_steps(param: str, value: Any, limits: RequestLimits) -> None:
    """A number of steps, or one for each part of the loop. Raises InvalidRequestError."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, int | float) and each > limits.max_steps:
            raise above(param, each, limits.max_steps)
        if isinstance(each, int | float) and each < 1:
            raise InvalidRequestError(f"{param} must be between 1 and {limits.max_steps}, got {value}", param)


def _is_accepted(body: GenerationBody, field: str, argument: str, description: StageDescription) -> bool:
    """False for a field that was dropped; raises NotSupportedError where the body is strict."""
    if description.takes(argument):
        return True
    reason = f"{field} is not supported: {description.pipeline_class} does not take it"
    body.refuse(NotSupportedError(reason, field))
    return False


def check_required(arguments: Mapping[str, Any], description: StageDescription) -> None:
    """Raises InvalidRequestError, and NotSupportedError for what nobody can send."""
    for name in description.required:
        if arguments.get(name) is None:
            field = FIELD_INSTEAD.get(name, name)
            if why := description.notes_of(name).why_not:
                raise NotSupportedError(f"{description.pipeline_class} needs {name}, which cannot be sent: {why}", name)
            raise InvalidRequestError(
                f"{field} is required by {description.pipeline_class}", field, "missing_required_parameter"
            )
