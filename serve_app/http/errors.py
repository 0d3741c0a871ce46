"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}, with their status.

`ERROR_KINDS` maps each kind of error to its answer. What is not in it is a bug: it is logged with its
traceback, and the caller gets a request id to quote, nothing of the inside.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException

from deployments.errors import (
    GenerationFailedError,
    InvalidRequestError,
    ModelNotFoundError,
    StageUnavailableError,
    StorageError,
    TriptychError,
)
from serve_app.jobs.records import ConflictError
from serve_app.making.admission import OverloadedError
from serve_app.storage.base import ObjectNotFoundError

logger = logging.getLogger(__name__)

UNAVAILABLE = "a part of the service is not available now; try again later"
OVERLOADED = "too many requests are waiting; try again later"
MAX_SHOWN_CHARS = 80


@dataclass(frozen=True)
class ErrorKind:
    """How errors of one class are answered; without a `message` the error's own text is sent."""

    error: type[Exception]
    status: int
    type: str
    code: str | None = None
    message: str | None = None


# The first row that fits counts. The texts of Ray's own errors hold tracebacks and paths: never sent.
ERROR_KINDS = (
    ErrorKind(ObjectNotFoundError, 404, "invalid_request_error"),
    ErrorKind(ModelNotFoundError, 404, "invalid_request_error"),
    ErrorKind(ConflictError, 409, "invalid_request_error"),
    ErrorKind(InvalidRequestError, 400, "invalid_request_error"),
    ErrorKind(OverloadedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    ErrorKind(StageUnavailableError, 503, "server_error", "stage_unavailable"),
    ErrorKind(StorageError, 502, "server_error", "storage_failed"),
    ErrorKind(GenerationFailedError, 500, "server_error", "generation_failed"),
    ErrorKind(TriptychError, 500, "server_error", "generation_failed"),
    ErrorKind(BackPressureError, 429, "rate_limit_error", "rate_limit_exceeded", OVERLOADED),
    ErrorKind(RayServeException, 503, "server_error", "stage_unavailable", UNAVAILABLE),
    ErrorKind(RayError, 503, "server_error", "stage_unavailable", UNAVAILABLE),
)
HTTP_CODES = {
    400: "invalid_body",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's shape; call it before the first route is declared."""
    app.router.route_class = ServeErrorRoute
    for error in (TriptychError, RayError, RayServeException, Exception):
        app.add_exception_handler(error, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)


class ServeErrorRoute(APIRoute):
    """A route that answers Serve's own errors itself.

    Serve replaces the application's handlers for them when a replica starts: its own answer in plain text.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answering(request: Request) -> Response:
            try:
                return await handler(request)
            except RayServeException as error:
                return error_answer(error, _request_id(request))

        return answering


def error_answer(error: Exception, request_id: str | None = None) -> JSONResponse:
    """The answer to `error`; from 500 on it is logged too, with `request_id` (None: a new one)."""
    request_id = request_id or uuid.uuid4().hex
    original = original_error(error)
    kind = next((kind for kind in ERROR_KINDS if isinstance(original, kind.error)), None)
    if kind is None:
        logger.error("request %s failed", request_id, exc_info=error)
        message = f"internal error; the server's log has it under request id {request_id}"
        return error_json(500, message, "server_error", code="internal_error")
    if kind.status >= 500:
        logger.error("request %s failed: %s", request_id, kind.code, exc_info=error)
    if isinstance(original, InvalidRequestError):
        return error_json(kind.status, original.message, kind.type, original.param, original.code)
    headers = None
    if isinstance(original, OverloadedError):
        headers = {"Retry-After": str(original.retry_after_s)}
    if isinstance(original, BackPressureError):
        headers = {"Retry-After": str(math.ceil(original.retry_after_s or 1))}
    return error_json(kind.status, kind.message or str(original), kind.type, code=kind.code, headers=headers)


def error_json(
    status: int,
    message: str,
    type: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """OpenAI's error object."""
    error = {"message": _encodable(message), "type": type, "param": param and _encodable(param), "code": code}
    return JSONResponse({"error": error}, status, headers)


def _encodable(text: str) -> str:
    """A name from the body may hold lone surrogates, which UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def original_error(error: Exception) -> Exception:
    """What a replica raised: Ray wraps it in an error that is of its class, but whose text is a traceback."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


def _request_id(request: Request) -> str | None:
    given = request.headers.get("x-request-id")  # Serve's proxy sets it
    return given[:128] if given else None


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return error_answer(error, _request_id(request))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {message}"
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    kind = "rate_limit_error" if error.status_code == 429 else kind
    headers = dict(error.headers) if error.headers else None
    return error_json(error.status_code, message, kind, code=HTTP_CODES.get(error.status_code), headers=headers)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    message = "; ".join(_problem_text(problem) for problem in problems[:5])
    code = _VALIDATION_CODES.get(problems[0]["type"], "invalid_value")
    return error_json(400, message, "invalid_request_error", _field(problems[0]), code)


_VALIDATION_CODES = {
    "json_invalid": "invalid_json",
    "missing": "missing_required_parameter",
    "unknown_field": "unknown_parameter",
}


def _field(problem: dict[str, Any]) -> str | None:
    """`n`, `extra_args.x`; None where the whole body is meant."""
    if problem["type"] == "unknown_field":
        return str(problem["ctx"]["field"])
    if problem["type"] == "extra_body":
        return "extra_body"
    if problem["type"] == "json_invalid":
        return None
    depth = 3 if "extra_args" in problem["loc"] else 2  # what follows are pydantic's words, not the caller's
    return ".".join(str(part) for part in problem["loc"][1:depth]) or None


def _problem_text(problem: dict[str, Any]) -> str:
    field, kind = _field(problem), problem["type"]
    if kind == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']} at position {problem['loc'][-1]}"
    if field is None:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    if kind == "missing":
        return f"{field} is required"
    if kind in ("unknown_field", "extra_body"):
        return str(problem["msg"])
    text = f"{field}: {problem['msg']}"
    if kind != "input_image" and isinstance(problem["input"], str | int | float):
        text += f", got {_shown(problem['input'])}"
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}... ({len(text)} characters)"
