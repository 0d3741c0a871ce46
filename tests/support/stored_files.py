"""A request to store files for, a key, and bytes: what tests of the storages share."""

from __future__ import annotations

from datetime import UTC, datetime

from deployments.messages import GenerationRequest, MediaKind, OutputFormat
from serve_app.storage.keys import object_key

NOW = datetime(2026, 11, 21, 23, 59, tzinfo=UTC)


def generation(request_id: str, kind: MediaKind = "image") -> GenerationRequest:
    return GenerationRequest(request_id, "m", {}, 0, OutputFormat(kind, "png" if kind == "image" else "mp4"))


KEY = object_key(generation("req_1-x"), 0, "image/png", NOW)
DATA = bytes(range(256)) * 500
