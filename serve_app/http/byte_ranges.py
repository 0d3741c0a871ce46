"""Files as answers: conditions (RFC 9110, section 13) and ranges (section 14), which is how players seek in videos."""

from __future__ import annotations

import hashlib
import re
import secrets
from email.utils import formatdate, parsedate_to_datetime

from fastapi import Response
from starlette.datastructures import Headers

MAX_RANGES = 16  # more of them, as an attacker would ask, are answered with the whole file
_RANGES = re.compile(r"bytes=(.*)", re.ASCII | re.IGNORECASE)
_RANGE = re.compile(r"(\d*)-(\d*)", re.ASCII)
_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_MAX_DIGITS = 18  # no file is longer, and no Python refuses to read the number

Bounds = tuple[int, int]  # the first and the last byte


class NotSatisfiableError(Exception):
    """No byte of the file lies in a range that was asked for."""


def file_answer(headers: Headers, data: bytes, content_type: str, name: str, stored_at: float) -> Response:
    """The file, or the ranges of it that a GET with these `headers` asks for.

    `stored_at` is a Unix time in seconds; the file is taken to be unchanged since. Of what the header fields of
    conditions say, the first that decides counts, in the order of RFC 9110, section 13.2.2.
    """
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    modified_at = int(stored_at)
    common = {
        "Accept-Ranges": "bytes",
        "ETag": tag,
        "Last-Modified": formatdate(modified_at, usegmt=True),
        "Content-Disposition": f'inline; filename="{name}"',
        "X-Content-Type-Options": "nosniff",
    }
    if not _preconditions_hold(headers, tag, modified_at):
        return Response(status_code=412, headers=common)
    if _caller_has_it(headers, tag, modified_at):
        return Response(status_code=304, headers=common)
    try:
        ranges = _asked_ranges(headers.get("range", ""), len(data)) if _range_counts(headers, tag, modified_at) else []
    except NotSatisfiableError:
        return Response(status_code=416, headers=common | {"Content-Range": f"bytes */{len(data)}"})
    if not ranges:
        return Response(data, media_type=content_type, headers=common)
    if len(ranges) == 1:
        [(start, end)] = ranges
        common["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return Response(data[start : end + 1], 206, common, media_type=content_type)
    body, boundary = _multipart(data, ranges, content_type)
    return Response(body, 206, common, media_type=f"multipart/byteranges; boundary={boundary}")


# --- conditions ---


def has_file(headers: Headers, tag: str) -> bool:
    """Whether the caller says that it has the file with this ETag (If-None-Match)."""
    return "if-none-match" in headers and _caller_has_it(headers, tag, 0)


def _preconditions_hold(headers: Headers, tag: str, modified_at: int) -> bool:
    """If-Match, or without it If-Unmodified-Since."""
    if "if-match" in headers:
        tags = _tags(headers, "if-match")
        return "*" in tags or tag in tags  # a weak tag matches nothing here
    since = _time(headers.get("if-unmodified-since"))
    return since is None or modified_at <= since


def _caller_has_it(headers: Headers, tag: str, modified_at: int) -> bool:
    """If-None-Match, or without it If-Modified-Since."""
    if "if-none-match" in headers:
        tags = _tags(headers, "if-none-match")
        return "*" in tags or tag in (each.removeprefix("W/") for each in tags)
    since = _time(headers.get("if-modified-since"))
    return since is not None and modified_at <= since


def _range_counts(headers: Headers, tag: str, modified_at: int) -> bool:
    """If-Range: the range is of this very file, or it means nothing."""
    known = headers.get("if-range")
    return known is None or known.strip() == tag or _time(known) == modified_at


def _tags(headers: Headers, name: str) -> list[str]:
    value = ", ".join(headers.getlist(name))
    return ["*"] if value.strip() == "*" else _TAG.findall(value)


def _time(value: str | None) -> int | None:
    """A date of HTTP as Unix time; None for what is none."""
    try:
        return int(parsedate_to_datetime(value or "").timestamp())
    except (TypeError, ValueError, OverflowError):
        return None


# --- ranges ---


def _asked_ranges(value: str, num_bytes: int) -> list[Bounds]:
    """Ranges that lie in the file, those that touch each other made one; none where the whole file is to be sent.

    A field that is no list of byte ranges is ignored, as the standard says. Raises NotSatisfiableError.
    """
    asked = _RANGES.fullmatch(value.strip())
    if asked is None:
        return []
    specs = [spec for each in asked[1].split(",") if (spec := each.strip(" \t"))]
    matches = [_RANGE.fullmatch(spec) for spec in specs]
    if not specs or len(specs) > MAX_RANGES:
        return []
    bounds = []
    for match in matches:
        if match is None or not (match[1] or match[2]):
            return []
        first, last = _number(match[1]), _number(match[2])
        if first is not None and last is not None and last < first:
            return []
        bounds.append(_bounds(first, last, num_bytes))
    inside = [(start, end) for start, end in bounds if start < num_bytes and start <= end]
    if not inside:
        raise NotSatisfiableError
    return _merged(inside)


def _number(digits: str) -> int | None:
    return int(digits.lstrip("0")[: _MAX_DIGITS + 1] or "0") if digits else None


def _bounds(first: int | None, last: int | None, num_bytes: int) -> Bounds:
    """Without a `first` byte, `last` counts from the end."""
    if first is None:
        return max(0, num_bytes - (last or 0)), num_bytes - 1
    return first, num_bytes - 1 if last is None else min(last, num_bytes - 1)


def _merged(bounds: list[Bounds]) -> list[Bounds]:
    """In the order they were asked for where they lie apart; else in the file's."""
    merged: list[Bounds] = []
    for start, end in sorted(bounds):
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return bounds if len(merged) == len(bounds) else merged


def _multipart(data: bytes, ranges: list[Bounds], content_type: str) -> tuple[bytes, str]:
    """The parts as multipart/byteranges (RFC 9110, section 14.6), and the boundary between them."""
    boundary = secrets.token_hex(16)
    parts = []
    for start, end in ranges:
        head = f"--{boundary}\r\nContent-Type: {content_type}\r\nContent-Range: bytes {start}-{end}/{len(data)}\r\n\r\n"
        parts += [head.encode(), data[start : end + 1], b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), boundary
