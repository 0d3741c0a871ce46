"""What holds for the value of every field of every body, whatever it means."""

from __future__ import annotations

import json
import typing
from typing import Any

from pydantic import BaseModel, ValidationInfo
from pydantic_core import PydanticCustomError

MAX_DIGITS = 100  # of a whole number: more than any field takes, and Python reads no more than 4,300
MAX_NUMBER = 1_000_000.0  # of a number with a fraction, either side of 0
MAX_DEPTH = 16  # of lists and objects within each other


def read_json(body: str | bytes) -> Any:
    """As json.loads; a whole number of too many digits is infinite, so that its field refuses it by name."""
    return json.loads(body, parse_int=_integer)


def given_value(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Of a field before its own checks. Raises PydanticCustomError.

    Arguments of a pipeline are checked by their own names, when the pipeline is known.
    """
    if info.field_name == "own_arguments":
        return value
    if isinstance(value, bool) and _is_number(cls, info.field_name):
        raise PydanticCustomError("plain_value", "must be a number, neither true nor false")
    if _has_nul(value):
        raise PydanticCustomError("plain_value", "must not have the character NUL")
    return value


def read_value(value: Any) -> Any:
    """Of a field after its own checks. Raises PydanticCustomError."""
    if isinstance(value, float) and abs(value) > MAX_NUMBER:
        raise PydanticCustomError("plain_value", f"must be between {-MAX_NUMBER:.0f} and {MAX_NUMBER:.0f}")
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else float("-inf" if digits.startswith("-") else "inf")


def _is_number(cls: type[BaseModel], field: str | None) -> bool:
    annotation = cls.model_fields[field].annotation if field else None
    choices = {annotation, *typing.get_args(annotation)}
    return bool(choices & {int, float}) and bool not in choices


def _has_nul(value: Any, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        raise PydanticCustomError("plain_value", f"may have lists and objects {MAX_DEPTH} deep in each other")
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, list | dict):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return any(_has_nul(each, depth + 1) for each in items)
    return False
