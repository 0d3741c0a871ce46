"""How a request is to be answered: at once, as a stream, or by a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from deployments.errors import InvalidRequestError, NotSupportedError
from serve_app.jobs.records import IdempotencyKey
from serve_app.jobs.service import body_digest
from serve_app.requests.bodies import ImageGenerationBody, VideoGenerationBody

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True)
class HowAsked:
    """What the headers and the body of a request say about how it is to be answered."""

    idempotency_key: str | None
    respond_async: bool
    is_streamed: bool = False

    @property
    def wants_job(self) -> bool:
        """A job answers at once, or can be asked for again."""
        return self.respond_async or self.idempotency_key is not None


def how_asked(headers: Mapping[str, str], body: object = None) -> HowAsked:
    """Raises InvalidRequestError for a key that is none."""
    key = headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequestError("Idempotency-Key must have 1 to 255 printable ASCII characters", "Idempotency-Key")
    preferences = headers.get("prefer", "").lower().replace(" ", "").split(",")
    respond_async = any(each.partition(";")[0] == "respond-async" for each in preferences)
    in_background = getattr(body, "background", None) in (True, "true")
    return HowAsked(key, respond_async or in_background, bool(getattr(body, "stream", None)))


def check_how_asked(asked: HowAsked, body: ImageGenerationBody | VideoGenerationBody) -> None:
    """Raises InvalidRequestError for fields that do not go together with the way of answering.

    OpenAI's own, which its clients send in any case, are dropped and named in `warnings`.
    """
    if not asked.respond_async and body.webhook_url is not None:
        error = NotSupportedError("webhook_url is for jobs: ask for one with Prefer: respond-async", "webhook_url")
        body.refuse(error)
    if asked.wants_job and asked.is_streamed:
        field = "background" if asked.respond_async else "Idempotency-Key"
        raise NotSupportedError(f"{field} is not supported together with stream: a job has events of its own", field)
    if asked.is_streamed and body.response_format == "url":
        body.drop("response_format", "response_format has no effect with stream: true, whose events hold the pictures")
    if body.partial_images and not asked.wants_job and not asked.is_streamed:
        needed = "stream: true, or background: true" if body.media_kind == "image" else "Prefer: respond-async"
        reason = f"partial_images={body.partial_images} has no effect without {needed} (for events of a job)"
        if body.media_kind == "video":  # ours, not OpenAI's
            body.refuse(InvalidRequestError(reason, "partial_images"))
        else:
            body.drop("partial_images", reason)


def idempotency_key(asked: HowAsked, route: str, body: BaseModel) -> IdempotencyKey | None:
    """The key stands for the body and the route that it came with."""
    if asked.idempotency_key is None:
        return None
    return IdempotencyKey(asked.idempotency_key, body_digest(route, body))
