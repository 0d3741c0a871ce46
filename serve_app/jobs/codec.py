"""Generation requests and checkpoints as the job store keeps them: JSON and flat bytes, no pickles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from deployments.messages import Checkpoint, GenerationRequest, InputImage, OutputFormat, Packed

_LENGTH_BYTES = 8  # of the number in front of a checkpoint's header


def requests_to_json(requests: Sequence[GenerationRequest]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The requests as JSON, and the pictures sent along, each once; the JSON has their numbers."""
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
            **row
            | {
                "arguments": {name: value(argument) for name, argument in row["arguments"].items()},
                "output": OutputFormat(**row["output"]),
            }
        )
        for row in rows
    ]


def work_digest(request: GenerationRequest) -> str:
    """Equal for requests that ask for the same work: all is the same but their ids and how they are followed."""
    plain = dataclasses.replace(request, request_id="")
    [row], pictures = requests_to_json([plain])
    sha = hashlib.sha256(json.dumps(row, sort_keys=True).encode())
    for picture in pictures:
        sha.update(hashlib.sha256(picture).digest())
    return sha.hexdigest()


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
