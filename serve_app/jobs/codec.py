"""Generation requests and checkpoints as the job store keeps them: JSON and flat bytes, no pickles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from deployments.messages import Checkpoint, GenerationRequest, InputImage, OutputFormat, Packed
from serve_app.errors import ErrorReport

_LENGTH_BYTES = 8  # of the number in front of a checkpoint's header


def requests_to_json(
    requests: Sequence[GenerationRequest], previews: int = 0
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The requests as JSON, and the pictures sent along, each once; the JSON has their numbers.

    `previews`: how many pictures each is to show on its way.
    """
    pictures: dict[bytes, int] = {}

    def argument(value: Any) -> dict[str, Any]:
        if isinstance(value, InputImage):
            return {"image": pictures.setdefault(value.data, len(pictures))}
        if isinstance(value, list) and any(isinstance(item, InputImage) for item in value):
            return {"images": [pictures.setdefault(item.data, len(pictures)) for item in value]}
        return {"value": value}

    rows = []
    for request in requests:
        row = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        row["arguments"] = {name: argument(value) for name, value in request.arguments.items()}
        row["output"] = dataclasses.asdict(request.output)
        row["previews"] = previews
        rows.append(row)
    return rows, list(pictures)


def requests_from_json(rows: Sequence[dict[str, Any]], pictures: Sequence[bytes]) -> list[GenerationRequest]:
    """The same requests again."""

    def value(argument: dict[str, Any]) -> Any:
        if "image" in argument:
            return InputImage(pictures[argument["image"]])
        if "images" in argument:
            return [InputImage(pictures[number]) for number in argument["images"]]
        return argument["value"]

    return [
        GenerationRequest(
            **{name: field for name, field in row.items() if name != "previews"}
            | {
                "arguments": {name: value(argument) for name, argument in row["arguments"].items()},
                "output": OutputFormat(**row["output"]),
            }
        )
        for row in rows
    ]


def previews_from_json(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many pictures each request is to show on its way."""
    return [int(row.get("previews", 0)) for row in rows]


def checkpoint_to_bytes(checkpoint: Checkpoint) -> bytes:
    """Its header as JSON, preceded by its length, then the buffers one after the other."""
    header = {
        "request_id": checkpoint.request_id,
        "step": checkpoint.step,
        "fingerprint": checkpoint.fingerprint,
        "digest": checkpoint.digest,
        "tree": checkpoint.content.tree,
        "buffer_bytes": [buffer.nbytes for buffer in checkpoint.content.buffers],
    }
    text = json.dumps(header).encode()
    buffers = [buffer.tobytes() for buffer in checkpoint.content.buffers]
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *buffers])


def checkpoint_from_bytes(data: bytes) -> Checkpoint:
    """The same checkpoint again; the denoiser holds its content against its digest."""
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = json.loads(data[_LENGTH_BYTES:end])
    buffers = []
    for num_bytes in header.pop("buffer_bytes"):
        buffers.append(np.frombuffer(data, np.uint8, num_bytes, end))
        end += num_bytes
    return Checkpoint(content=Packed(header.pop("tree"), tuple(buffers)), **header)


def error_to_json(report: ErrorReport) -> dict[str, Any]:
    """Why a job failed, as the store keeps it."""
    error = dataclasses.asdict(report)
    del error["retry_after_s"]  # of the moment, not of the job
    return error


def error_from_json(error: dict[str, Any] | None) -> ErrorReport | None:
    """The same report again; of what earlier versions wrote, parts may be missing."""
    if error is None:
        return None
    status = error.get("status", 409)  # 409: it was cancelled
    kind = error.get("type") or ("server_error" if status >= 500 else "invalid_request_error")
    return ErrorReport(status, kind, error["message"], error["code"], error.get("param"))
