"""Checks the value of an argument against the type that the pipeline's own annotation gives it."""

from __future__ import annotations

import math
import re
from typing import Any

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.messages import InputImage, InputSound, ValueType
from serve_app.requests.limits import RequestLimits

MAX_NUMBER = 1_000_000  # of an argument, either side of 0: far beyond what any model makes a picture of
MAX_DEPTH = 8  # of lists and objects within each other
MAX_SHOWN_CHARS = 80

NOT_JSON = ("tensor", "object")
WORDS = {
    "any": "any value",
    "none": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "dict": "an object",
    "picture": "a picture",
    "video": "a video",
    "sound": "a sound",
    "record": "an object",
    "tensor": "a picture",
}


class _File:
    """How a file is shown to people."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __repr__(self) -> str:
        return self._words


FILE_WORDS = {InputImage: _File("a picture"), InputSound: _File("a sound"), bytes: _File("a file")}


# A place of str.format with a width (which may ask for gigabytes), an attribute or an item: pipelines fill templates.
FORMATTED = re.compile(r"(?<!\{)\{(?!\{)[^{}]*[:.!\[]")


class _Misfit(Exception):
    """The value is not of the type."""


def argument_value(param: str, value: Any, wanted: ValueType, limits: RequestLimits) -> Any:
    """The value as JSON has it, but 5.0 as 5 where the pipeline counts.

    Raises NotSupportedError for an argument that JSON cannot carry, InvalidRequestError that names `param`, the
    value and what is allowed.
    """
    if not has_json_form(wanted) and value is not None:
        raise NotSupportedError(f"{param} does not take a plain value, so it cannot be sent as JSON", param)
    _check_sizes(param, value, limits)
    try:
        return _fitted(value, wanted)
    except _Misfit:
        raise InvalidRequestError(f"{param} must be {in_words(wanted)}, got {shown(value)}", param) from None


def takes_one_picture(wanted: ValueType) -> bool:
    """Its annotation has a picture, and neither a list nor a tensor, which may hold several."""
    choices = {choice.kind for choice in (wanted.of if wanted.kind == "union" else (wanted,))}
    return "picture" in choices and choices <= {"picture", "none", "object"}


def in_words(wanted: ValueType) -> str:
    """The type for people, without what cannot be sent."""
    items = [in_words(part) for part in wanted.of if part.kind != "object"]
    match wanted.kind:
        case "union":
            return " or ".join(dict.fromkeys(items))
        case "choice":
            return " or ".join(repr(choice) for choice in wanted.choices)
        case "list" | "row":
            return f"a list of which each is {items[0]}" if items else "a list"
        case "tuple":
            return f"a list of {len(items)}: {', '.join(items)}"
        case "record":
            fields = [f"{name} ({each})" for name, each in zip(wanted.names, items, strict=True)]
            return f"an object with {', '.join(fields)}"
        case kind:
            return WORDS.get(kind, "left out")


def shown(value: object) -> str:
    """The value, cut where it is long; files are said to be some."""
    text = repr(_without_files(value))
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def _without_files(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_files(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_files(each) for name, each in value.items()}
    return FILE_WORDS.get(type(value), value)


def _fitted(value: Any, wanted: ValueType) -> Any:
    match wanted.kind:
        case "picture" | "tensor" if isinstance(value, InputImage):
            return value
        case "tensor" if _are_pictures(value):
            return value
        case "list" | "row" if _are_pictures(value) and wanted.of[0].holds("picture"):
            return [each if each is None else _fitted(each, wanted.of[0]) for each in value]
        case "video" if _is_video(value):
            return value
        case "sound" if isinstance(value, InputSound):
            return value
        case "record" if isinstance(value, dict) and set(wanted.needed) <= value.keys() <= set(wanted.names):
            types = dict(zip(wanted.names, wanted.of, strict=True))
            return {name: _fitted(each, types[name]) for name, each in value.items()}
        case "any" if not _holds_bytes(value):  # a file of a form; one that is taken has been read by now
            return value
        case "union":
            return _first_fitted(value, wanted.of)
        case "int" if isinstance(value, float) and value.is_integer():
            return int(value)
        case "list" | "row" | "tuple" if isinstance(value, list):
            items = wanted.of if wanted.kind == "tuple" else wanted.of * len(value)
            if len(items) != len(value):
                raise _Misfit
            return [_fitted(each, item) for each, item in zip(value, items, strict=True)]
        case "dict" if isinstance(value, dict):
            return {name: _fitted(each, wanted.of[0]) for name, each in value.items()}
        case "choice" if value in wanted.choices:
            return value
    if not _is_of_plain(value, wanted.kind):
        raise _Misfit
    return value


def _holds_bytes(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, bytes) or any(map(_holds_bytes, parts))


def _are_pictures(value: Any) -> bool:
    """A list of pictures, at any depth; null stands for one that is not there."""
    if not isinstance(value, list) or not value:
        return False
    return all(each is None or isinstance(each, InputImage) or _are_pictures(each) for each in value)


def _is_video(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, InputImage) for each in value)


def _first_fitted(value: Any, choices: tuple[ValueType, ...]) -> Any:
    for choice in choices:
        try:
            return _fitted(value, choice)
        except _Misfit:
            continue
    raise _Misfit


def _is_of_plain(value: Any, kind: str) -> bool:
    match kind:
        case "none":
            return value is None
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "str":
            return isinstance(value, str)
    return False


def has_json_form(wanted: ValueType) -> bool:
    """Besides null."""
    if wanted.kind in ("union", "list", "row", "tuple"):
        return any(has_json_form(part) for part in wanted.of)
    return wanted.kind not in (*NOT_JSON, "none")  # files have forms as text


def _check_sizes(param: str, value: Any, limits: RequestLimits, depth: int = 0) -> None:
    """Raises InvalidRequestError for what is beyond the bounds of any argument, whatever its type."""
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{param}: lists and objects may lie {MAX_DEPTH} deep in each other", param)
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) <= MAX_NUMBER):
        allowed = f"between {-MAX_NUMBER} and {MAX_NUMBER}"
        raise InvalidRequestError(f"{param}: a number must be {allowed}, got {shown(value)}", param)
    if isinstance(value, str):
        check_text(param, value, limits)
    if isinstance(value, list | dict) and not _is_video(value):
        if len(value) > limits.max_steps:
            raise above(param, len(value), limits.max_steps, " entries")
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_sizes(param, each, limits, depth + 1)


def check_depth(param: str, value: Any, depth: int = 0) -> None:
    """Raises InvalidRequestError for lists and objects too deep in each other."""
    if depth > MAX_DEPTH:
        raise InvalidRequestError(f"{param}: lists and objects may lie {MAX_DEPTH} deep in each other", param)
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_depth(param, each, depth + 1)


def check_text(param: str, value: str, limits: RequestLimits) -> None:
    """Raises InvalidRequestError for a text that is too long, or that no tokenizer and no file can hold."""
    if re.search(r"[\0\ud800-\udfff]", value):
        raise InvalidRequestError(f"{param} must be valid Unicode without the character NUL", param)
    if len(value) > limits.max_prompt_chars:
        raise above(param, len(value), limits.max_prompt_chars, " characters")
    if "template" in param and FORMATTED.search(value):
        raise InvalidRequestError(f"{param} must have plain places for texts, such as {{}}, got {shown(value)}", param)


def above(field: str, value: float, limit: float, unit: str = "") -> InvalidRequestError:
    """The refusal of what is more than a limit."""
    return InvalidRequestError(f"{field}: at most {limit}{unit}, got {value}", field, "limit_exceeded")
