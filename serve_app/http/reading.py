"""Bodies that come as JSON or as a form: both become the same model, with the same refusals."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from serve_app.http.middleware.limits import MAX_BODY_BYTES_AT_ONCE
from serve_app.requests.plain_values import read_json

Body = TypeVar("Body", bound=BaseModel)

MAX_FILES = 20
MAX_FIELDS = 200
MAX_DEPTH = 5  # of a[b][c]
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
TEXT_FIELDS = ("prompt", "negative_prompt")  # taken as they are, whatever they look like


async def read_body(request: Request, body_type: type[Body]) -> Body:
    """The body of `request` as a `body_type`.

    Raises RequestValidationError for a value that does not fit (as FastAPI does), HTTPException 400 for a form
    that is broken and 415 for a type of content that is neither.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in FORM_TYPES:
        values: Any = await _read_form(request)
    elif content_type in ("", "application/json") or content_type.endswith("+json"):  # none was said
        values = await _read_json(request)
    else:
        raise HTTPException(415, "the body must be application/json or multipart/form-data")
    return validated(values, body_type)


def validated(values: Any, body_type: type[Body]) -> Body:
    """Raises RequestValidationError with the places of errors as FastAPI names them."""
    try:
        return body_type.model_validate(values)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from error


def openapi_content(body_type: type[BaseModel], files: tuple[str, ...]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body with `read_body`; `files` may be uploaded.

    serve_app.http.openapi moves the `$defs` of the schemas into the components.
    """
    schema = json.loads(_schema(body_type))
    uploads = {
        name: {"type": "string", "format": "binary", "description": schema["properties"][name].get("description", "")}
        for name in files
    }
    form = {**schema, "properties": schema["properties"] | uploads}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


@functools.cache
def _schema(body_type: type[BaseModel]) -> str:
    return json.dumps(body_type.model_json_schema(ref_template="#/components/schemas/{model}"))


class _JSONRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


class JSONRoute(APIRoute):
    """A route of which FastAPI reads the body, as `read_body` reads JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JSONRequest(request.scope, request.receive))

        return handle


async def _read_json(request: Request) -> Any:
    body = await request.body()
    try:
        return read_json(body)
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "input": {}, "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, "the body is not valid JSON") from error


async def _read_form(request: Request) -> dict[str, Any]:
    """A form's fields: `a`, repeated `a`, `a[]` or `a[0]` (a list), `a[key]` (an object), files as bytes.

    `a[][key]` is of a list of objects.
    Names of files are read nowhere: they are the caller's, and say nothing that the bytes do not.
    """
    values: dict[str, Any] = {}
    columns: dict[str, dict[tuple[str, ...], list[Any]]] = {}
    async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_BODY_BYTES_AT_ONCE) as form:
        for given_name, field in form.multi_items():
            name, *keys = [part.removesuffix("]") for part in given_name.split("[")]
            if _is_null(name, field):
                continue
            value = await field.read() if isinstance(field, UploadFile) else field
            is_of_a_list = keys[:1] == [""]
            if keys := [key for key in keys if key]:
                member = value if isinstance(value, bytes) else _plain_value(value)
                if is_of_a_list:
                    columns.setdefault(name, {}).setdefault(tuple(keys), []).append(member)
                else:
                    _put(values, [name, *keys], member)
            elif name in values:
                several = values[name] if isinstance(values[name], list) else [values[name]]
                values[name] = [*several, value]
            elif isinstance(value, str) and value.lstrip().startswith("{") and name not in TEXT_FIELDS:
                values[name] = _plain_value(value)
            else:
                values[name] = value
    for name, columns_of in columns.items():
        _put_rows(values, name, columns_of)
    return {name: _with_lists(value) for name, value in values.items()}


def _is_null(name: str, field: UploadFile | str) -> bool:
    """Forms have no null: an empty value, OpenAI's `null`, and the empty file of a page's form stand for it."""
    if isinstance(field, UploadFile):
        return not field.filename and not field.size
    return name not in TEXT_FIELDS and field.strip() in ("", "null")


def _put_rows(values: dict[str, Any], name: str, columns: dict[tuple[str, ...], list[Any]]) -> None:
    """`name[][path]`: OpenAI's clients send all values of one path before those of the next.

    So the n-th value of each belongs to the n-th object. Where they are not equally many, nobody knows whose they are.
    """
    if len({len(column) for column in columns.values()}) > 1:
        way_out = f"give each the same keys, or send {name} as JSON text"
        raise HTTPException(400, f"the form does not say which values of {name}[] belong together: {way_out}")
    for path, column in columns.items():
        for row, value in enumerate(column):
            _put(values, [name, str(row), *path], value)


def _put(values: dict[str, Any], path: list[str], value: Any) -> None:
    *objects, last = path
    if len(path) > MAX_DEPTH:
        raise HTTPException(400, f"the form has {path[0]!r} more than {MAX_DEPTH - 1} levels deep")
    for name in objects:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise HTTPException(400, f"the form has {name!r} both as a value and as an object")
    if last in values:
        raise HTTPException(400, f"the form has {path[0]}[{']['.join(path[1:])}] twice")
    values[last] = value


def _with_lists(value: Any) -> Any:
    """An object whose names are all numbers is a list."""
    if not isinstance(value, dict):
        return value
    members = {name: _with_lists(member) for name, member in value.items()}
    if members and all(name.isdecimal() for name in members):
        return [members[name] for name in sorted(members, key=int)]
    return members


def _plain_value(value: str | bytes) -> Any:
    """Forms have no types: a value that reads as JSON is taken as JSON."""
    try:
        return read_json(value)
    except (ValueError, RecursionError):
        return value
