"""Files sent over HTTP for a pipeline's own arguments, and what the unsplit pipeline makes of the same ones."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.media.outputs import Making, files_to_write
from deployments.messages import GenerationRequest, OutputFormat
from tests.support.model_in_process import ModelServer
from tests.support.tiny_models import request_arguments
from tests.support.tiny_models.checkpoints import load_unsplit

SEED = 3


def file_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return file.getvalue()


def in_json(picture: Image.Image) -> str:
    return base64.b64encode(file_of(picture)).decode()


def unsplit(name: str, folder: Path, changes: dict[str, Any]) -> list[bytes]:
    """The pixels of what the whole pipeline makes of the model's own request with these arguments."""
    return pixels_of(load_unsplit(folder), request_arguments(name) | changes)


def pixels_of(pipeline: Any, arguments: dict[str, Any]) -> list[bytes]:
    torch.manual_seed(SEED)
    with torch.no_grad():
        output = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(SEED), output_type="pt")
    kind = "video" if hasattr(output, "frames") else "image"
    request = GenerationRequest("r", "model", {}, SEED, OutputFormat(kind, "mp4" if kind == "video" else "png"))
    [file] = files_to_write(output, request, Making(8.0))
    return [frame.tobytes() for frame in file.frames]


def served(server: ModelServer, **asked: Any) -> list[bytes]:
    """The pixels of the answer, a picture or a moving WebP without loss."""
    answer = server.post(**asked)
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return [np.asarray(Image.open(io.BytesIO(data))).tobytes()]


def made_frames(server: ModelServer, fields: dict[str, Any], given: dict[str, Any]) -> list[bytes]:
    """The frames that the decoder stage made, before they become a file that loses some of them."""
    answer = server.post("/v1/videos/generations", json={**fields, **given, "response_format": "b64_json"})
    assert answer.status_code == 200, answer.text
    request = server.handle.requests[-1]
    decoded = server.handle.decoded[request.request_id]
    return [frame.tobytes() for frame in decoded.files[0].frames]


def fields_of(name: str, *left_out: str) -> dict[str, Any]:
    """The model's own request in the words of a body."""
    fields = {each: value for each, value in request_arguments(name).items() if each not in left_out}
    size = f"{fields.pop('width', 16)}x{fields.pop('height', 16)}"
    return {**fields, "size": size, "seed": SEED}
