"""Parts of a file, as RFC 9110 (section 14) lets callers ask for them: this is how players seek in videos."""

from __future__ import annotations

import hashlib
import re

from fastapi import Response
from starlette.datastructures import Headers

_RANGE = re.compile(r"bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII)


def file_answer(headers: Headers, data: bytes, content_type: str, name: str) -> Response:
    """The file, or the one range of it that the request's `headers` ask for (several: the whole file)."""
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    common = {"Accept-Ranges": "bytes", "ETag": tag, "Content-Disposition": f'inline; filename="{name}"'}
    if headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=common)
    asked = _RANGE.fullmatch(headers.get("range", ""))
    bounds = _bounds(asked[1], asked[2], len(data)) if asked else None
    if bounds is None or headers.get("if-range", tag) != tag:
        return Response(data, media_type=content_type, headers=common)
    start, end = bounds
    if start >= len(data) or start > end:
        return Response(status_code=416, headers=common | {"Content-Range": f"bytes */{len(data)}"})
    common["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return Response(data[start : end + 1], 206, common, media_type=content_type)


def _bounds(first: str, last: str, num_bytes: int) -> tuple[int, int] | None:
    """The first and the last byte, None if it is no range; without a first, `last` counts from the end."""
    if not first:
        return (max(0, num_bytes - int(last)), num_bytes - 1) if last else None
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last), num_bytes - 1) if last else num_bytes - 1
