"""The application's errors, and ErrorReport: any error as callers read it.

They stand under deployments.errors, whose tree goes on here:

InvalidRequestError
├── NotFoundError
│   ├── ObjectNotFoundError   no stored file has this key                                                 (404)
│   ├── JobNotFoundError      there is no such job, or it is somebody else's                              (404)
│   └── AdapterNotFoundError  no LoRA has this name                                                       (404)
├── NotAllowedError           the caller's API key may not do this                                        (403)
└── ConflictError             what was asked does not fit what is there                                   (409)
TriptychError
├── OverloadedError           the queue is full                                                           (429)
├── ModelLoadingError         the model was asleep, and takes longer to load than a caller waits          (503)
├── StorageError
│   └── StorageAwayError      the storage did not answer, or not as a storage does                        (502)
├── JobStoreAwayError         the job store did not answer, or is not there                               (503)
├── TimeLimitError
│   ├── StartTimeoutError     it had not begun by the time that its caller gave it                        (504)
│   └── CancelAfterError      it was not done by the time that its caller gave it                         (504)
└── LeaseLostError            a job belongs to another runner now; never leaves serve_app.jobs

`ERROR_KINDS` maps each kind of error to its report. What is not in it is a bug: it is logged with its
traceback, and the caller gets a request id to quote, nothing of the inside.
"""

from __future__ import annotations

import logging
import math
import uuid
from dataclasses import dataclass

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from deployments.errors import (
    DeviceFullError,
    GenerationFailedError,
    InvalidRequestError,
    ModelNotFoundError,
    StageUnavailableError,
    StorageError,
    TriptychError,
)

logger = logging.getLogger(__name__)

UNAVAILABLE = "a part of the service is not available now; try again later"
RETRY_AFTER_S = 5  # what is told with 503
OVERLOADED = "too many requests are waiting; try again later"


class NotFoundError(InvalidRequestError):
    """What the caller names is not there."""


class ObjectNotFoundError(NotFoundError):
    """No object has this key."""

    def __init__(self, message: str, param: str | None = "key", code: str = "file_not_found") -> None:
        super().__init__(message, param, code)


class JobNotFoundError(NotFoundError):
    """There is no such job, or it is somebody else's."""

    def __init__(self, message: str, param: str | None = "id", code: str = "job_not_found") -> None:
        super().__init__(message, param, code)


class AdapterNotFoundError(NotFoundError):
    """No LoRA has this name."""

    def __init__(self, message: str, param: str | None = "loras", code: str = "lora_not_found") -> None:
        super().__init__(message, param, code)


class NotAllowedError(InvalidRequestError):
    """The caller's API key may not do this."""

    def __init__(self, message: str, param: str | None = None, code: str = "not_allowed") -> None:
        super().__init__(message, param, code)


class ConflictError(InvalidRequestError):
    """What was asked does not fit what is there."""

    def __init__(self, message: str, param: str | None = None, code: str = "conflict") -> None:
        super().__init__(message, param, code)


class OverloadedError(TriptychError):
    """The queue is full; after `retry_after_s` seconds there should be room."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class ModelLoadingError(TriptychError):
    """The model was asleep and is being loaded; after `retry_after_s` seconds it should be there."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class StorageAwayError(StorageError):
    """The storage did not answer in time, or not as a storage does: the next call would fare no better."""


class JobStoreAwayError(TriptychError):
    """The job store does not answer, or is not there; what was asked may be asked again."""

    retry_after_s = 5


class TimeLimitError(TriptychError):
    """The time that the caller gave a request is over."""


class StartTimeoutError(TimeLimitError):
    """It had not begun, and is not made."""


class CancelAfterError(TimeLimitError):
    """It was not done, and is not made any further."""


class LeaseLostError(TriptychError):
    """The job was cancelled, deleted, or taken over by another runner: nothing more may be written to it."""


@dataclass(frozen=True)
class ErrorReport:
    """An error in OpenAI's words; `status` is that of HTTP."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None  # the field at fault
    retry_after_s: int | None = None

    def __post_init__(self) -> None:
        """A name from the caller's body may hold lone surrogates, which UTF-8 cannot."""
        for name in ("message", "param"):
            text: str | None = getattr(self, name)
            if text is not None:
                object.__setattr__(self, name, text.encode("utf-8", "backslashreplace").decode("utf-8"))


@dataclass(frozen=True)
class ErrorKind:
    """How errors of one class are reported; without a `message` callers read the error's own text."""

    error: type[Exception]
    status: int
    type: str
    code: str | None = None
    message: str | None = None


# The first row that fits counts. The texts of Ray's own errors hold tracebacks and paths: never sent.
ERROR_KINDS = (
    ErrorKind(NotFoundError, 404, "invalid_request_error"),
    ErrorKind(ModelNotFoundError, 404, "invalid_request_error"),
    ErrorKind(NotAllowedError, 403, "invalid_request_error"),
    ErrorKind(ConflictError, 409, "invalid_request_error"),
    ErrorKind(InvalidRequestError, 400, "invalid_request_error"),
    ErrorKind(OverloadedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    ErrorKind(StartTimeoutError, 504, "server_error", "start_timeout"),
    ErrorKind(CancelAfterError, 504, "server_error", "cancel_after"),
    ErrorKind(ModelLoadingError, 503, "server_error", "model_loading"),
    ErrorKind(StageUnavailableError, 503, "server_error", "stage_unavailable"),
    ErrorKind(DeviceFullError, 503, "server_error", "device_full"),
    ErrorKind(StorageError, 502, "server_error", "storage_failed"),
    ErrorKind(JobStoreAwayError, 503, "server_error", "job_store_unavailable"),
    ErrorKind(GenerationFailedError, 500, "server_error", "generation_failed"),
    ErrorKind(TriptychError, 500, "server_error", "generation_failed"),
    ErrorKind(BackPressureError, 429, "rate_limit_error", "rate_limit_exceeded", OVERLOADED),
    ErrorKind(RayServeException, 503, "server_error", "stage_unavailable", UNAVAILABLE),
    ErrorKind(RayError, 503, "server_error", "stage_unavailable", UNAVAILABLE),
)


def report_error(error: Exception, request_id: str | None = None) -> ErrorReport:
    """The report of `error`; a fault of the server is logged too, with `request_id` (None: a new one)."""
    request_id = request_id or uuid.uuid4().hex
    original = original_error(error)
    kind = next((kind for kind in ERROR_KINDS if isinstance(original, kind.error)), None)
    if kind is None:
        logger.error("request %s failed", request_id, exc_info=error)
        message = f"internal error; the server's log has it under request id {request_id}"
        return ErrorReport(500, "server_error", message, code="internal_error")
    if kind.status >= 500 and not isinstance(original, TimeLimitError | ModelLoadingError):
        logger.error("request %s failed: %s", request_id, kind.code, exc_info=error)
    if isinstance(original, InvalidRequestError):
        return ErrorReport(kind.status, kind.type, original.message, original.code, original.param)
    retry_after_s = _retry_after_s(original) or (RETRY_AFTER_S if kind.status == 503 else None)
    return ErrorReport(kind.status, kind.type, kind.message or str(original), kind.code, None, retry_after_s)


def _retry_after_s(error: Exception) -> int | None:
    if isinstance(error, OverloadedError | ModelLoadingError | JobStoreAwayError):
        return error.retry_after_s
    if isinstance(error, BackPressureError):
        return math.ceil(error.retry_after_s or 1)
    return None


def original_error(error: Exception) -> Exception:
    """What a replica raised: Ray wraps it in an error that is of its class, but whose text is a traceback."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error
