"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}, with their status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from deployments.errors import TriptychError
from serve_app.errors import ErrorReport, report_error

MAX_SHOWN_CHARS = 80
# OpenAI's client repeats a request by itself at every 409 and 5xx unless it is told that this is in vain.
NOT_TO_REPEAT = ("idempotency_conflict", "cancelled", "start_timeout", "cancel_after")
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
    """Answer every error of `app` in OpenAI's shape."""
    for error in (TriptychError, RayError, RayServeException, Exception):
        app.add_exception_handler(error, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)


def error_response(report: ErrorReport, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The report as an answer, with further `headers`."""
    told = dict(headers or {})
    if report.retry_after_s is not None:
        told["Retry-After"] = str(report.retry_after_s)
    if report.code in NOT_TO_REPEAT:
        told["x-should-retry"] = "false"
    return JSONResponse(error_content(report), report.status, told)


def error_content(report: ErrorReport) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {
            "message": report.message,
            "type": report.type,
            "param": report.param,
            "code": report.code,
        }
    }


def _request_id(request: Request) -> str | None:
    given = request.headers.get("x-request-id")  # Serve's proxy sets it
    return given[:128] if given else None


async def _answer(request: Request, error: Exception) -> JSONResponse:
    return error_response(report_error(error, _request_id(request)))


async def _answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path}: {message}"
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    kind = "rate_limit_error" if error.status_code == 429 else kind
    report = ErrorReport(error.status_code, kind, message, HTTP_CODES.get(error.status_code))
    return JSONResponse(error_content(report), report.status, dict(error.headers) if error.headers else None)


async def _answer_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    message = "; ".join(_problem_text(problem) for problem in problems[:5])
    code = _VALIDATION_CODES.get(problems[0]["type"], "invalid_value")
    return error_response(ErrorReport(400, "invalid_request_error", message, code, _field(problems[0])))


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
    text = f"{field}: {problem['msg'].removeprefix('Value error, ')}"
    if kind != "input_image" and isinstance(problem["input"], str | int | float):
        text += f", got {_shown(problem['input'])}"
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}... ({len(text)} characters)"
