"""What stands for a file in a body: its bytes, a data URL, base64, a URL, or an output that this server made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from deployments.messages import InputImage
from serve_app.requests.given.encoded_files import file_bytes

URL_NAMES = ("url", "image_url", "video_url", "audio_url")
REFERENCE_NAMES = frozenset({*URL_NAMES, "id", "index", "file_id", "data", "format", "detail", "type"})
HOW_GIVEN = 'an upload, a data URL, base64, a URL, or {"id": ...} or {"file_id": ...} of what was made here'


@dataclass(frozen=True)
class RemoteFile:
    """A file to be fetched before the request is made."""

    url: str


@dataclass(frozen=True)
class EarlierOutput:
    """A file that was made here: the `index`-th of the job `id`, or the one stored under `file_id`."""

    id: str = ""
    index: int = 0
    file_id: str = ""


Reference = bytes | RemoteFile | EarlierOutput


def is_reference(value: Any) -> bool:
    """Whether it can only stand for a file, be it one that can be read or not."""
    if isinstance(value, dict):
        return bool(value) and value.keys() <= REFERENCE_NAMES
    return isinstance(value, bytes | str | InputImage | RemoteFile | EarlierOutput)


def reference_of(value: Any) -> Reference:
    """Raises ValueError for what stands for no file."""
    if isinstance(value, dict):
        return _of_object(value)
    if isinstance(value, str):
        return RemoteFile(value) if re.match(r"https?:", value, re.IGNORECASE) else file_bytes(value)
    if isinstance(value, InputImage):
        return value.data
    if isinstance(value, bytes | RemoteFile | EarlierOutput):
        return value
    raise ValueError("it is neither a text nor an object")


def _of_object(value: dict[str, Any]) -> Reference:
    """OpenAI's objects too: {"image_url": ...}, {"image_url": {"url": ...}}, {"file_id": ...}, {"data": base64}."""
    index = value.get("index", 0)
    if isinstance(job_id := value.get("id"), str) and isinstance(index, int) and index >= 0:
        return EarlierOutput(id=job_id, index=index)
    if isinstance(file_id := value.get("file_id"), str):
        return EarlierOutput(file_id=file_id.strip("/").removeprefix("v1/files/"))
    for name in (*URL_NAMES, "data"):
        if value.get(name) is not None:
            return reference_of(value[name])
    raise ValueError("it names no file")
