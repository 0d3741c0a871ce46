"""The OpenAPI document as the server behaves: errors in OpenAI's shape, and no 422, which it never sends."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serve_app.http.answers import JobObject

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "the field at fault"},
                "code": {"type": ["string", "null"], "description": "see docs/errors.md"},
            },
        }
    },
}
ERROR = {
    "description": "An error in OpenAI's shape",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
EVENT_STREAM: dict[str, Any] = {  # the content of an answer that is a stream of events
    "text/event-stream": {
        "schema": {
            "type": "object",
            "required": ["event", "data"],
            "properties": {
                "id": {"type": "string", "description": "for Last-Event-ID, where a stream can be taken up again"},
                "event": {"type": "string"},
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
        }
    }
}
FILE_ANSWERS: dict[int | str, dict[str, Any]] = {  # of routes that answer with a file
    206: {"description": "the ranges that were asked for"},
    304: {"description": "what the caller has (If-None-Match, If-Modified-Since) is still the file"},
    412: {"description": "the file is another one than the caller means (If-Match, If-Unmodified-Since)"},
    416: {"description": "the ranges lie beyond the end of the file"},
}
JOB_ACCEPTED: dict[str, Any] = {
    "description": "The job that makes it, where one was preferred: at `Location`, to be asked for after `Retry-After`",
    "model": JobObject,
}
FASTAPI_ERRORS = ("HTTPValidationError", "ValidationError")


def describe_truly(app: FastAPI) -> None:
    """Replace what FastAPI would answer at /openapi.json."""
    app.openapi = functools.partial(openapi_document, app)  # type: ignore[method-assign]


def openapi_document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = document.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for name in FASTAPI_ERRORS:
            schemas.pop(name, None)
        schemas["Error"] = ERROR_SCHEMA
        components["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"api_key": []}]  # keys are asked for where the server has api_keys_file
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                operation["responses"] |= {"4XX": ERROR, "5XX": ERROR}
        app.openapi_schema = document
    return app.openapi_schema
