"""FastAPI's fields, made once a process: each application makes hundreds of equal ones, half of a server's start."""

from __future__ import annotations

from typing import Any, get_args

from fastapi._compat import v2
from pydantic import TypeAdapter

_KEPT: dict[tuple[Any, str], TypeAdapter[Any]] = {}


def keep_fields() -> None:
    """From now on equal annotations of parameters and answers share what pydantic makes of them."""
    v2.TypeAdapter = kept_adapter  # type: ignore[misc, assignment]


def kept_adapter(annotated: Any, *, config: Any = None) -> TypeAdapter[Any]:
    """That of the same type with the same constraints; a type or function in it lives as long as what is kept."""
    if config is not None:
        return TypeAdapter(annotated, config=config)
    of_type, *constraints = get_args(annotated)
    key = of_type, repr(constraints)
    if key not in _KEPT:
        _KEPT[key] = TypeAdapter(annotated)
    return _KEPT[key]
