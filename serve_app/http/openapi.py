"""The OpenAPI document as the server behaves: errors in OpenAI's shape, and no 422, which it never sends."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

from deployments.errors import StageUnavailableError
from deployments.messages import StageDescription
from serve_app.http.answers import JobObject
from serve_app.http.context import context_of
from serve_app.models.service import ModelService
from serve_app.requests.bodies import GenerationBody
from serve_app.requests.given.configured import told_defaults
from serve_app.requests.given.schemas import form_schema, model_fields, own_fields
from serve_app.requests.limits import RequestLimits
from serve_app.requests.translate import sendable_arguments
from serve_app.service import Service

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


def describe_truly(app: FastAPI, service: Service) -> None:
    """Replace what FastAPI would answer at /openapi.json; the fields of a model are told as soon as it is ready."""
    app.openapi = functools.partial(openapi_document, app)  # type: ignore[method-assign]
    [route] = [each for each in app.router.routes if getattr(each, "path", None) == app.openapi_url]
    answer: Any = route.endpoint  # type: ignore[attr-defined]

    async def with_models(request: Request) -> Response:
        described = await asyncio.gather(*map(_described, service.models.of_caller(context_of(request.scope).caller)))
        ready = [each for each in described if each is not None]
        is_one_of_several = len(described) > 1
        app.openapi = lambda: with_model_fields(  # type: ignore[method-assign]
            openapi_document(app), ready, is_one_of_several
        )
        response: Response = await answer(request)
        return response

    app.router.routes.remove(route)
    app.add_route(str(app.openapi_url), with_models, include_in_schema=False)


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Of any model."""
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
                _move_schemas(operation.get("requestBody", {}).get("content", {}), schemas)
        app.openapi_schema = document
    return app.openapi_schema


@dataclass(frozen=True)
class ReadyModel:
    """A model that has said what it takes."""

    name: str
    description: StageDescription
    limits: RequestLimits


async def _described(model: ModelService) -> ReadyModel | None:
    with contextlib.suppress(StageUnavailableError):
        return ReadyModel(model.name, await model.describe_as_configured(), model.limits)
    return None


def with_model_fields(
    document: dict[str, Any], models: Sequence[ReadyModel], is_one_of_several: bool = False
) -> dict[str, Any]:
    """The document with each argument of the served models as a field of the bodies that ask for their media, and with
    what counts where a field is left out.

    Of one of several models each field says whose it is.
    """
    document = copy.deepcopy(document)
    bodies = {body.__name__: body for body in _all_bodies(GenerationBody)}
    forms = [
        content["multipart/form-data"]["schema"]
        for path in document["paths"].values()
        for operation in path.values()
        if "multipart/form-data" in (content := operation.get("requestBody", {}).get("content", {}))
    ]
    for schema in [*document["components"]["schemas"].values(), *forms]:
        body = bodies.get(schema.get("title", ""))
        if body is None:
            continue
        is_form = any(schema is form for form in forms)
        for name, fields in _fields_of(body, models, is_form).items():
            if name not in schema["properties"]:
                schema["properties"][name] = _of_models(fields) if is_one_of_several else next(iter(fields.values()))
        own = own_fields(body)
        for name, defaults in _defaults_of(body, models).items():
            if name in own and name in schema["properties"]:
                schema["properties"][name] |= _default_of_models(schema["properties"][name], defaults)
    return document


def _fields_of(
    body: type[GenerationBody], models: Sequence[ReadyModel], is_form: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    """The schema of each field of the body, by the models that have it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        description = model.description
        if body.media_kind == description.media_kind:
            for name, field in model_fields(body, description, model.limits).items():
                schema = form_schema(description.type_of(name), field) if is_form else field
                found.setdefault(name, {})[model.name] = schema
    return found


def _defaults_of(body: type[GenerationBody], models: Sequence[ReadyModel]) -> dict[str, dict[str, Any]]:
    """What counts where a field of the body is left out, by the models of its media that say so; null: unknown."""
    found: dict[str, dict[str, Any]] = {}
    of_media = [model for model in models if model.description.media_kind == body.media_kind]
    for model in of_media:
        description = model.description
        for field, default in told_defaults(description, sendable_arguments(body, description)).items():
            found.setdefault(field, dict.fromkeys(each.name for each in of_media))[model.name] = default
    return found


def _default_of_models(schema: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`default` where all models have one, else a sentence that has each."""
    first, *others = defaults.values()
    if all(other == first and type(other) is type(first) for other in others):
        return {"default": first}
    told = ", ".join(f"{name} {json.dumps(value)}" for name, value in defaults.items() if value is not None)
    return {"description": f"{schema.get('description', '')}; default: {told}".removeprefix("; ")}


def _of_models(fields: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One schema for what several models take under one name."""
    first, *others = fields.values()
    if all(other == first for other in others):
        return _told_of(", ".join(fields), first)
    return {"anyOf": [_told_of(name, field) for name, field in fields.items()]}


def _told_of(names: str, field: dict[str, Any]) -> dict[str, Any]:
    return field | {"description": f"{names}: {field.get('description', '')}".rstrip(": ")}


def _all_bodies(body: type[GenerationBody]) -> list[type[GenerationBody]]:
    return [each for child in body.__subclasses__() for each in (child, *_all_bodies(child))]


def _move_schemas(content: dict[str, Any], schemas: dict[str, Any]) -> None:
    """What the schemas of a body refer to goes into the components, and that of JSON itself."""
    for kind, media in content.items():
        schema = media.get("schema", {})
        schemas |= schema.pop("$defs", {})
        if kind == "application/json" and "title" in schema:
            schemas[schema["title"]] = schema
            media["schema"] = {"$ref": f"#/components/schemas/{schema['title']}"}
