"""Requests that were read before, held against the model that is to make them now: another one, or one that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployments.adapters.use import FEATURE
from deployments.errors import NotSupportedError
from deployments.media.opening import read_header
from deployments.messages import GenerationRequest, InputImage, RequestWarning, StageDescription, ValueType
from serve_app.requests.argument_values import above, argument_value, check_text
from serve_app.requests.bodies import FIELD_INSTEAD
from serve_app.requests.given.configured import SIDES
from serve_app.requests.input_pictures import check_picture
from serve_app.requests.limits import RequestLimits
from serve_app.requests.outputs import check_kind
from serve_app.requests.translate import (
    ARGUMENT_FIELDS,
    RATE_ARGUMENTS,
    check_length,
    check_pictures,
    check_required,
    check_sides,
    check_steps,
)

STEPS = "num_inference_steps"
A_NUMBER = ValueType("float")


def check_taken(request: GenerationRequest, description: StageDescription, own: Sequence[Mapping[str, Any]]) -> None:
    """Whether the model can make it at all, whatever its limits. `own`: the arguments that are configured for it.

    Raises NotSupportedError or InvalidRequestError, with the field in `param`.
    """
    check_kind(request.output.kind, description)
    for name, value in request.arguments.items():
        if not description.takes(name) and not _is_own(name, value, own):
            field = FIELD_INSTEAD.get(name, name)
            raise NotSupportedError(f"{field} is not supported: {description.pipeline_class} does not take it", field)
    if request.features.get(FEATURE) and not description.takes_adapters:
        raise NotSupportedError(f"{FEATURE} is not supported: {description.pipeline_class} takes none", FEATURE)
    check_required(request.arguments, description)


def without_steps(request: GenerationRequest, description: StageDescription) -> GenerationRequest:
    """For a model that takes no number of steps, with a warning: a model that does says it where no caller has."""
    if STEPS not in request.arguments or description.takes(STEPS):
        return request
    message = f"{STEPS} has no effect: {description.pipeline_class} does not take it"
    return replace(
        request,
        arguments={name: value for name, value in request.arguments.items() if name != STEPS},
        warnings=(*request.warnings, RequestWarning("no_effect", STEPS, message)),
    )


def check_within(
    request: GenerationRequest, description: StageDescription, limits: RequestLimits, own: Sequence[Mapping[str, Any]]
) -> None:
    """Whether a request for what the model takes is within its limits; what is configured for it always is, and what
    its pipeline does by default: requests have that without being asked for it.

    Raises InvalidRequestError that names the field.
    """
    own = [*own, description.parameters]
    asked = {name: value for name, value in request.arguments.items() if not _is_own(name, value, own)}
    for name, value in asked.items():
        if value is not None:
            _check_value(name, value, description, limits)
    if any(name in asked for name in SIDES):
        known = {name: request.arguments.get(name) or getattr(description, f"default_{name}") for name in SIDES}
        check_sides({name: side for name, side in known.items() if isinstance(side, int)}, description, limits)


def _is_own(name: str, value: Any, own: Sequence[Mapping[str, Any]]) -> bool:
    return any(name in arguments and arguments[name] == value for arguments in own)


def _check_value(name: str, value: Any, description: StageDescription, limits: RequestLimits) -> None:
    field = FIELD_INSTEAD.get(name, name)
    for picture in _pictures_in(value):
        if description.type_of(name).holds("video") or name == "video":  # a frame that was written here, as PNG
            read_header(picture.data, field, limits.max_input_pixels)
        else:
            check_picture(picture.data, field, limits)
    if name == "video" and isinstance(value, list) and len(value) > limits.max_frames:
        raise above(field, len(value), limits.max_frames, " frames")
    if name not in ARGUMENT_FIELDS or isinstance(value, int | float):
        wanted = A_NUMBER if name in RATE_ARGUMENTS else description.type_of(name)  # as when it was asked for
        argument_value(field, value, wanted, limits)
    elif isinstance(value, str):
        check_text(field, value, limits)
    elif isinstance(value, list) and name != "video":
        check_pictures(field, value, description, limits)
    if STEPS in name:
        check_steps(field, value, limits)
    if name == "num_frames" and value > limits.max_frames:
        raise above(field, value, limits.max_frames, " frames")
    if name == "max_sequence_length" and value > limits.max_prompt_tokens:
        raise above(field, value, limits.max_prompt_tokens, " tokens")
    if name == description.length_argument:
        check_length(field, value, limits)


def _pictures_in(value: Any) -> list[InputImage]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, InputImage) else [each for part in parts for each in _pictures_in(part)]
