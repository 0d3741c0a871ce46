"""How a request is to be answered: at once, as a stream, or by a job; and how long it may take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import Headers

from deployments.errors import InvalidRequestError, NotSupportedError
from serve_app.deadlines import NO_LIMITS, TimeLimits
from serve_app.jobs.records import IdempotencyKey
from serve_app.jobs.service import body_digest
from serve_app.requests.bodies import MediaBody

MAX_WAIT_S = 3600
MAX_LIMIT_S = 30 * 86_400.0

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_DURATION = re.compile(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d{1,9})?)s?)?", re.ASCII)
_UNITS_S = (3600, 60, 1)


@dataclass(frozen=True)
class HowAsked:
    """What the headers and the body of a request say about how it is to be answered."""

    idempotency_key: str | None
    respond_async: bool
    is_streamed: bool = False
    wait_s: int | None = None  # for a job, before the answer is the job itself
    limits: TimeLimits = NO_LIMITS

    @property
    def wants_job(self) -> bool:
        """A job answers at once, or can be asked for again."""
        return self.respond_async or self.wait_s is not None or self.idempotency_key is not None

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for what it makes."""
        return self.wait_s != 0 and (self.wait_s is not None or not self.respond_async)

    @property
    def preference_applied(self) -> str:
        """For the header of the same name; empty where nothing was preferred."""
        applied = ["respond-async"] if self.respond_async else []
        return ", ".join(applied if self.wait_s is None else [*applied, f"wait={self.wait_s}"])

    @property
    def asking_field(self) -> str:
        """The header or the field that makes it a job."""
        if self.idempotency_key is not None and not self.respond_async and self.wait_s is None:
            return "Idempotency-Key"
        return "background" if self.respond_async else "Prefer"


def how_asked(headers: Headers, body: object = None) -> HowAsked:
    """Raises InvalidRequestError with the name of the header whose value it cannot have."""
    key = headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequestError("Idempotency-Key must have 1 to 255 printable ASCII characters", "Idempotency-Key")
    preferred = preferences(headers.getlist("prefer"))
    in_background = getattr(body, "background", None) in (True, "true")
    return HowAsked(
        key,
        "respond-async" in preferred or in_background,
        bool(getattr(body, "stream", None)),
        wait_of(preferred),
        TimeLimits(_seconds(headers, "X-Request-Start-Timeout"), _seconds(headers, "Cancel-After")),
    )


def preferences(headers: Sequence[str]) -> dict[str, str]:
    """The preferences of `Prefer` headers (RFC 7240) and their values; of a repeated one the first counts."""
    found: dict[str, str] = {}
    for each in ",".join(headers).split(","):
        name, _, value = each.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def wait_of(preferred: dict[str, str]) -> int | None:
    """Seconds of `wait`; None without it. Raises InvalidRequestError."""
    value = preferred.get("wait")
    if value is None:
        return None
    if not re.fullmatch(r"\d{1,9}", value, re.ASCII) or int(value) > MAX_WAIT_S:
        raise InvalidRequestError(
            f"Prefer: wait must be a whole number of seconds from 0 to {MAX_WAIT_S}, got {value[:80]!r}", "Prefer"
        )
    return int(value)


def _seconds(headers: Headers, name: str) -> float | None:
    """A header's number of seconds, or its hours, minutes and seconds as in 1h30m or 90s."""
    value = headers.get(name)
    if value is None:
        return None
    found = _DURATION.fullmatch(value.strip())
    given = found.groups() if found else ()
    seconds = sum(float(number) * unit for number, unit in zip(given, _UNITS_S, strict=False) if number)
    if not 0 < seconds <= MAX_LIMIT_S:
        raise InvalidRequestError(
            f"{name} must be seconds above 0, up to {MAX_LIMIT_S:g}, such as 30, 2.5, 90s or 1h30m, got {value[:80]!r}",
            name,
        )
    return seconds


def check_how_asked(asked: HowAsked, body: MediaBody) -> None:
    """Raises InvalidRequestError for fields that do not go together with the way of answering.

    OpenAI's own, which its clients send in any case, are dropped and named in `warnings`.
    """
    if not asked.wants_job and body.webhook_url is not None:
        error = NotSupportedError("webhook_url is for jobs: ask for one with Prefer: respond-async", "webhook_url")
        body.refuse(error)
    if asked.is_streamed and (asked.respond_async or asked.wait_s is not None):
        field = asked.asking_field
        raise NotSupportedError(f"{field} is not supported together with stream: a job has events of its own", field)
    if asked.is_streamed and body.response_format == "url":
        body.drop("response_format", "response_format has no effect with stream: true, whose events hold the pictures")
    partial_images = getattr(body, "partial_images", None)
    if partial_images and not asked.wants_job and not asked.is_streamed:
        needed = "stream: true, or background: true" if body.media_kind == "image" else "Prefer: respond-async"
        reason = f"partial_images={partial_images} has no effect without {needed} (for events of a job)"
        if body.media_kind == "video":  # ours, not OpenAI's
            body.refuse(InvalidRequestError(reason, "partial_images"))
        else:
            body.drop("partial_images", reason)


def idempotency_key(asked: HowAsked, route: str, body: BaseModel) -> IdempotencyKey | None:
    """The key stands for the body and the route that it came with."""
    if asked.idempotency_key is None:
        return None
    return IdempotencyKey(asked.idempotency_key, body_digest(route, body))


# --- the same headers in the OpenAPI document ---


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


_DURATIONS = {"type": "string", "pattern": r"^([0-9]{1,9}h)?([0-9]{1,9}m)?([0-9]{1,9}(\.[0-9]{1,9})?s?)?$"}
PREFER = _header(
    "Prefer",
    "RFC 7240. `respond-async`: the answer is a job, at once. `wait=n`: the result, if it is there within n seconds, "
    f"else the job (202); n up to {MAX_WAIT_S}",
    {"type": "string", "examples": ["respond-async", "wait=30"]},
)
ASKING_HEADERS: dict[str, Any] = {
    "parameters": [
        _header(
            "Idempotency-Key",
            "The same call again with the same key makes nothing new: it waits for what the first makes, and is "
            "answered as the first would have been. With another body: 409",
            {"type": "string", "pattern": f"^{_KEY.pattern}$"},
        ),
        PREFER,
        _header(
            "Cancel-After",
            "It is cancelled if it is not done so long after it was accepted: seconds, or as in 1h30m",
            _DURATIONS | {"examples": ["300", "5m"]},
        ),
        _header(
            "X-Request-Start-Timeout",
            "It is not made if no denoiser has taken it up so long after it was accepted: seconds, or as in 1h30m",
            _DURATIONS | {"examples": ["30", "2m"]},
        ),
    ]
}
WAITING_HEADER: dict[str, Any] = {"parameters": [PREFER]}
