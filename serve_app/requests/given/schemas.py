"""The fields of the served model as JSON Schema, for its page and the OpenAPI document."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from deployments.messages import MEDIA_TYPES, StageDescription, ValueType
from serve_app.requests.bodies import GenerationBody
from serve_app.requests.given.references import HOW_GIVEN
from serve_app.requests.limits import RequestLimits
from serve_app.requests.translate import sendable_arguments

MEDIA_OF = {"picture": "image/*", "video": "video/*", "sound": "audio/*"}
PLAIN = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "none": "null"}
UNSENT = ("tensor", "object")
LIMIT_OF = {
    "num_inference_steps": "max_steps",
    "num_frames": "max_frames",
    "max_sequence_length": "max_prompt_tokens",
}


def model_fields(body: type[GenerationBody], description: StageDescription, limits: RequestLimits) -> dict[str, Any]:
    """Of each argument of the pipeline that has a field of its own name, the JSON Schema of the field."""
    own = own_fields(body)
    return {
        name: _field(name, description, limits) | _bounds(own.get(name, {}))
        for name, field in sendable_arguments(body, description).items()
        if field == name
    }


@functools.cache
def own_fields(body: type[GenerationBody]) -> Mapping[str, Any]:
    """The JSON Schema of each field of the body, without those of any model; made once, so it is not to be changed."""
    properties: dict[str, Any] = body.model_json_schema()["properties"]
    return properties


def form_schema(wanted: ValueType, schema: dict[str, Any]) -> dict[str, Any]:
    """The field in a form, where files are uploaded."""
    if not wanted.holds(*MEDIA_TYPES) or wanted.holds("record"):
        return schema
    file = {"type": "string", "format": "binary"}
    is_list = wanted.holds("list", "row")
    about = {"description": schema["description"]} if "description" in schema else {}
    return ({"anyOf": [file, {"type": "array", "items": file}]} if is_list else file) | about


def json_schema(wanted: ValueType) -> dict[str, Any]:
    """Of the values that may be sent; files in all forms in which JSON can have them."""
    parts = [json_schema(part) for part in wanted.of if part.kind not in UNSENT]
    match wanted.kind:
        case "union":
            return {"anyOf": parts} if len(parts) != 1 else parts[0]
        case "choice":
            return {"enum": list(wanted.choices)}
        case "list" | "row":
            return {"type": "array"} | ({"items": parts[0]} if parts and parts[0] else {})
        case "tuple":
            return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
        case "dict":
            return {"type": "object"} | ({"additionalProperties": parts[0]} if parts and parts[0] else {})
        case "record":
            properties = dict(zip(wanted.names, parts, strict=True))
            schema = {"type": "object", "properties": properties, "additionalProperties": False}
            return schema | ({"required": list(wanted.needed)} if wanted.needed else {})
        case "picture" | "sound":
            return {"anyOf": _references(wanted.kind)}
        case "video":
            pictures = {"type": "array", "items": {"anyOf": _references("picture")}}
            return {"anyOf": [*_references("video"), pictures]}
        case kind:
            return {"type": PLAIN[kind]} if kind in PLAIN else {}


def medium_of(wanted: ValueType) -> str | None:
    """picture, video or sound; None for plain values and objects."""
    return next((kind for kind in MEDIA_TYPES if wanted.holds(kind) and not wanted.holds("record")), None)


def without_notes(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without what is told beside it."""
    return {word: value for word, value in schema.items() if word not in ("description", "default")}


def _references(kind: str) -> list[dict[str, Any]]:
    text = {"type": "string", "contentMediaType": MEDIA_OF[kind], "description": HOW_GIVEN}
    index = {"type": "integer", "minimum": 0}
    earlier = {"type": "object", "required": ["id"], "properties": {"id": {"type": "string"}, "index": index}}
    stored = {"type": "object", "required": ["file_id"], "properties": {"file_id": {"type": "string"}}}
    return [text, earlier, stored]


def _field(name: str, description: StageDescription, limits: RequestLimits) -> dict[str, Any]:
    notes = description.notes_of(name)
    about = {
        "description": notes.description,
        "default": notes.default,
        "minimum": notes.minimum,
        "maximum": getattr(limits, LIMIT_OF[name]) if name in LIMIT_OF else notes.maximum,
    }
    known = {word: value for word, value in about.items() if value not in (None, "")}
    return json_schema(description.type_of(name)) | known


def _bounds(field: dict[str, Any]) -> dict[str, Any]:
    """Those that the body itself has."""
    of_choices = {word: value for choice in field.get("anyOf", ()) for word, value in choice.items()}
    words = ("minimum", "maximum", "exclusiveMinimum")
    return {word: value for word, value in (of_choices | field).items() if word in words}
