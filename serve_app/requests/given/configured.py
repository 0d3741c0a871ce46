"""What the served model says of itself, with the configured values where the pipeline has defaults of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deployments.messages import JSON, StageDescription

SIDES = ("width", "height")


def as_configured(description: StageDescription, usual: Mapping[str, JSON]) -> StageDescription:
    """`usual`: the arguments of a request that names none. For what callers are told; requests are read without it."""
    changed: dict[str, Any] = {name: value for name, value in usual.items() if name in description.parameters}
    notes = {name: replace(description.notes_of(name), default=value) for name, value in changed.items()}
    width, height = (changed.get(side) or getattr(description, f"default_{side}") for side in SIDES)
    return replace(
        description,
        parameters=description.parameters | changed,
        argument_notes=description.argument_notes | notes,
        default_width=width,
        default_height=height,
    )


def told_defaults(description: StageDescription, fields: Mapping[str, str]) -> dict[str, JSON]:
    """What counts where a request leaves a field of the body out, by field, as far as it is known.

    `description` as configured; `fields`: of each argument of the pipeline, see `sendable_arguments`.
    """
    told = {name: default_of(name, description.parameters.get(name), description) for name in fields}
    defaults = {field: told[name] for name, field in fields.items() if field != "size"}
    width, height = (told.get(side) for side in SIDES)
    if width is not None and height is not None:
        defaults["size"] = f"{width}x{height}"
    length = description.length_argument
    if length is not None and not told.get(length.replace("_end", "_start")):
        defaults["seconds"] = told.get(length)
    return {field: value for field, value in defaults.items() if value is not None}


def default_of(name: str, told: JSON, description: StageDescription) -> JSON:
    """`told`: that of the call's signature, over which the configured ones are laid; a size may be the pipeline's."""
    if told is None and name in SIDES:
        side: int | None = getattr(description, f"default_{name}")
        return side
    return told
