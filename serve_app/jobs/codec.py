"""Requests and checkpoints as the job store keeps them: versioned JSON and flat bytes, no pickles.

A row of another version is read as far as its fields are known: unknown fields are dropped with a warning, missing
ones take their defaults. A checkpoint is an aid: one that cannot be read is ignored with a warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, get_args

import numpy as np

from deployments.errors import TriptychError
from deployments.messages import (
    Background,
    Checkpoint,
    GenerationRequest,
    InputFile,
    InputImage,
    InputSound,
    MediaKind,
    OutputFormat,
    Packed,
    RequestWarning,
)
from deployments.tracing import Carrier
from serve_app.errors import ErrorReport
from serve_app.storage.base import CONTENT_TYPES

logger = logging.getLogger(__name__)

VERSION = 1  # of a row and of a checkpoint; a row without one is of version 0

Row = dict[str, Any]


class UnreadableRowError(TriptychError):
    """A stored request lacks what no default can stand for: its job cannot be made."""


# --- requests ---

WORK = "work"
DROPPED: tuple[str, ...] = ()

# For each earlier version: where its fields stand today. A field that is not named is one of the work.
MOVED: dict[int, dict[str, tuple[str, ...]]] = {
    0: {
        "complete_hand_off": DROPPED,
        "report_progress": DROPPED,
        "owner": DROPPED,
        "refused_before": DROPPED,
        "previews": ("previews",),
        "cache_dit": (WORK, "features", "cache_dit"),
    }
}


@dataclass(frozen=True)
class Field:
    """A field that is read: what it must be, and whether a default can stand for it."""

    is_right: Callable[[Any], bool]
    is_required: bool = False


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


ROW_FIELDS = {
    "version": Field(_is_whole),
    WORK: Field(_is_object, True),
    "previews": Field(_is_whole),
    "trace": Field(_is_object),
}
WORK_FIELDS = {
    "request_id": Field(_is_text, True),
    "model": Field(_is_text, True),
    "arguments": Field(_is_object, True),
    "seed": Field(_is_whole, True),
    "output": Field(_is_object, True),
    "deterministic": Field(lambda value: isinstance(value, bool)),
    "deadline_s": Field(_is_number),
    "features": Field(_is_object),
    "num_steps": Field(_is_whole),
    "warnings": Field(lambda value: isinstance(value, list)),
    "left_out": Field(lambda value: isinstance(value, list)),
}
WARNING_FIELDS = {"code": Field(_is_text), "param": Field(_is_text), "message": Field(_is_text)}
OUTPUT_FIELDS = {
    "kind": Field(lambda value: value in get_args(MediaKind), True),
    "format": Field(lambda value: value in tuple(CONTENT_TYPES), True),
    "quality": Field(_is_whole),
    "fps": Field(_is_number),
    "background": Field(lambda value: value in get_args(Background)),
    "max_frames": Field(_is_whole),
    "bit_depth": Field(lambda value: value in (8, 16)),
}


@dataclass(frozen=True)
class Asked:
    """What answers tell of a job's first request; empty where its row cannot be read."""

    model: str = ""
    seed: int = 0
    output_format: str = ""
    background: str = ""


def requests_to_json(
    requests: Sequence[GenerationRequest], previews: int = 0, trace: Carrier | None = None
) -> tuple[list[Row], list[bytes]]:
    """The requests as JSON, and the files sent along, each once; the JSON has their numbers.

    `previews`: how many pictures each is to show on its way. `trace`: that of the HTTP request that they came with.
    """
    pictures: dict[bytes, int] = {}

    def argument(value: Any) -> dict[str, Any]:
        if isinstance(value, InputImage):
            return {"image": pictures.setdefault(value.data, len(pictures))}
        if isinstance(value, InputSound):
            return {"sound": pictures.setdefault(value.data, len(pictures))}
        if isinstance(value, list) and value and all(isinstance(item, InputImage) for item in value):
            return {"images": [pictures.setdefault(item.data, len(pictures)) for item in value]}
        if isinstance(value, list) and _holds_file(value):
            return {"list": [argument(item) for item in value]}
        if isinstance(value, dict) and _holds_file(value):
            return {"object": {name: argument(item) for name, item in value.items()}}
        return {"value": value}

    rows = []
    for request in requests:
        work = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        work["arguments"] = {name: argument(value) for name, value in request.arguments.items()}
        work["output"] = dataclasses.asdict(request.output)
        if request.output.bit_depth == OutputFormat.bit_depth:  # earlier versions do not know it
            del work["output"]["bit_depth"]
        for name in ("warnings", "left_out"):
            work[name] = [dataclasses.asdict(warning) for warning in work[name]]
        work = {
            name: value for name, value in work.items() if value or name not in ("warnings", "left_out", "num_steps")
        }
        rows.append({"version": VERSION, WORK: work, "previews": previews} | ({"trace": dict(trace)} if trace else {}))
    return rows, list(pictures)


def requests_from_json(rows: Sequence[Row], pictures: Sequence[bytes]) -> list[GenerationRequest]:
    """The same requests again, at least one, also from rows of another version. Raises UnreadableRowError."""
    if not isinstance(rows, list) or not rows:
        raise UnreadableRowError("the stored job holds no request that can be read")
    shaped = [today(row) for row in rows]
    if newer := sorted({repr(row.get("version")) for row in shaped} - {repr(VERSION)}):
        logger.warning("stored requests of version %s are read as of version %d", ", ".join(newer), VERSION)
    return [_request(row, pictures) for row in shaped]


def previews_from_json(rows: Sequence[Row]) -> list[int]:
    """How many pictures each request is to show on its way. Raises UnreadableRowError."""
    return [previews if _is_whole(previews := today(row).get("previews")) else 0 for row in rows]


def trace_from_json(rows: Any) -> Carrier:
    """That of the HTTP request that a job with these rows came with; empty where it was not traced."""
    first: Any = rows[0] if isinstance(rows, list) and rows else None
    trace: Any = first.get("trace") if _is_object(first) else None
    return {name: value for name, value in trace.items() if _is_text(value)} if _is_object(trace) else {}


def asked_from_json(rows: Sequence[Row]) -> Asked:
    """What answers tell of a job with these rows."""
    try:
        work = _known(today(rows[0])[WORK], WORK_FIELDS)
        output = _known(work["output"], OUTPUT_FIELDS)
        return Asked(work["model"], work["seed"], output["format"], output.get("background", ""))
    except (LookupError, UnreadableRowError):
        return Asked()


def today(row: Any) -> Row:
    """A row of any version in the shape of today's, its fields not checked. Raises UnreadableRowError."""
    if not _is_object(row):
        raise UnreadableRowError("a stored request cannot be read: it is no JSON object")
    version = row.get("version", VERSION if WORK in row else 0)
    moved = next((moves for earlier, moves in MOVED.items() if earlier == version), None)
    if moved is None:
        return dict(row)
    shaped: Row = {"version": VERSION, WORK: {}}
    for name, value in row.items():
        path = moved.get(name, (WORK, name))
        if path and value is not None:
            _put(shaped, path, value)
    return shaped


def _put(row: Row, path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        if not _is_object(row.get(name)):
            row[name] = {}
        row = row[name]
    row[path[-1]] = value


def _request(row: Row, pictures: Sequence[bytes]) -> GenerationRequest:
    work = _complete(_complete(row, ROW_FIELDS, "row")[WORK], WORK_FIELDS, "request")
    output = OutputFormat(**_complete(work["output"], OUTPUT_FIELDS, "output format"))
    try:
        arguments = {name: _argument(value, pictures) for name, value in work["arguments"].items()}
    except (LookupError, TypeError) as error:
        raise UnreadableRowError(f"a stored request cannot be read: an argument is damaged: {error}") from error
    warnings = {name: warnings_from_json(work.get(name, [])) for name in ("warnings", "left_out")}
    return GenerationRequest(**work | {"arguments": arguments, "output": output} | warnings)


def warnings_from_json(rows: Sequence[Any]) -> tuple[RequestWarning, ...]:
    """Those that can be read."""
    known = [_known(row, WARNING_FIELDS) for row in rows]
    return tuple(
        RequestWarning(row["code"], row.get("param"), row["message"])
        for row in known
        if {"code", "message"} <= row.keys()
    )


def _known(values: Any, fields: dict[str, Field]) -> Row:
    """The fields that are read: null stands for no field, and a value of the wrong type is not known."""
    if not _is_object(values):
        return {}
    return {name: value for name, value in values.items() if name in fields and fields[name].is_right(value)}


def _complete(values: Row, fields: dict[str, Field], what: str) -> Row:
    """The fields that are read, what cannot be dropped with a warning. Raises UnreadableRowError."""
    known = _known(values, fields)
    if dropped := sorted(name for name, value in values.items() if name not in known and value is not None):
        logger.warning("a stored %s has fields that this version does not know, dropped: %s", what, ", ".join(dropped))
    if missing := [name for name, field in fields.items() if field.is_required and name not in known]:
        raise UnreadableRowError(f"a stored {what} cannot be read: it lacks {', '.join(missing)}")
    return known


def _argument(argument: Any, pictures: Sequence[bytes]) -> Any:
    if "image" in argument:
        return _picture(argument["image"], pictures)
    if "images" in argument:
        return [_picture(number, pictures) for number in argument["images"]]
    if "sound" in argument:
        return InputSound(_file(argument["sound"], pictures))
    if "list" in argument:
        return [_argument(each, pictures) for each in argument["list"]]
    if "object" in argument:
        return {name: _argument(each, pictures) for name, each in argument["object"].items()}
    return argument["value"]


def _picture(number: Any, pictures: Sequence[bytes]) -> InputImage:
    return InputImage(_file(number, pictures))


def _file(number: Any, files: Sequence[bytes]) -> bytes:
    if not 0 <= number < len(files):
        raise LookupError(f"there is no file number {number}")
    data: bytes = files[number]
    return data


def _holds_file(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, InputFile) or any(map(_holds_file, parts))


# --- checkpoints: MAGIC, SHA-256 of the rest, length of the header, header as JSON, the buffers one after the other ---

MAGIC = b"triptych"  # version 0 began with the length of its header: no length is as large as these bytes
_LENGTH_BYTES = 8  # little-endian
_DIGEST_BYTES = 32

CHECKPOINT_FIELDS = {"request_id": _is_text, "step": _is_whole, "fingerprint": _is_text, "digest": _is_text}


def checkpoint_to_bytes(checkpoint: Checkpoint) -> bytes:
    """A file of the checkpoint that shows whether it is whole."""
    header = {name: getattr(checkpoint, name) for name in CHECKPOINT_FIELDS} | {
        "version": VERSION,
        "tree": checkpoint.content.tree,
        "buffer_bytes": [buffer.nbytes for buffer in checkpoint.content.buffers],
    }
    text = json.dumps(header).encode()
    buffers = [buffer.tobytes() for buffer in checkpoint.content.buffers]
    body = b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *buffers])
    return b"".join([MAGIC, hashlib.sha256(body).digest(), body])


def checkpoint_from_bytes(data: bytes) -> Checkpoint | None:
    """The same checkpoint again; None, with a warning, for one that is damaged or of another version.

    The denoiser holds the content against its digest too.
    """
    try:
        return _checkpoint(data)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("a saved checkpoint is ignored, its request starts again: %s", error)
        return None


def _checkpoint(data: bytes) -> Checkpoint:
    if not data.startswith(MAGIC):
        raise ValueError("it is of version 0, or damaged")  # the denoiser of today could not use one of version 0
    body = memoryview(data)[len(MAGIC) + _DIGEST_BYTES :]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : len(MAGIC) + _DIGEST_BYTES]:
        raise ValueError("it is damaged")
    end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(body[_LENGTH_BYTES:end]))
    if not _is_object(header):
        raise ValueError("its header is no JSON object")
    if header.get("version") != VERSION:
        raise ValueError(f"it is of version {header.get('version')!r}")
    for name, is_right in CHECKPOINT_FIELDS.items():
        if not is_right(header[name]):
            raise ValueError(f"its field {name!r} has the wrong type")
    buffers = tuple(_buffers(body[end:], header["buffer_bytes"]))
    return Checkpoint(content=Packed(header["tree"], buffers), **{name: header[name] for name in CHECKPOINT_FIELDS})


def _buffers(data: memoryview, sizes: Sequence[int]) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    if any(not _is_whole(size) or size < 0 for size in sizes) or sum(sizes) != len(data):
        raise ValueError("it is cut or has bytes too many")
    begin = 0
    for size in sizes:
        yield np.frombuffer(data[begin : begin + size], np.uint8)
        begin += size


# --- errors ---


def error_to_json(report: ErrorReport) -> Row:
    """Why a job failed, as the store keeps it."""
    error = dataclasses.asdict(report)
    del error["retry_after_s"]  # of the moment, not of the job
    return error


def error_from_json(error: Row) -> ErrorReport:
    """The same report again; of what earlier versions wrote, parts may be missing."""
    if "code" not in error:
        return ErrorReport(500, "server_error", "the job failed; why is not known", "generation_failed")
    status = error.get("status", 409)  # 409: it was cancelled
    kind = error.get("type") or ("server_error" if status >= 500 else "invalid_request_error")
    return ErrorReport(status, kind, error.get("message", ""), error["code"], error.get("param"))
