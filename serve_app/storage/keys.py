"""Keys of stored files, and the address under which this server hands a key's file out."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from deployments.messages import GenerationRequest, MediaKind
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.base import CONTENT_TYPES

_EXTENSIONS = {content_type: extension for extension, content_type in CONTENT_TYPES.items()}
_FOLDERS: dict[MediaKind, str] = {"image": "images", "video": "videos", "audio": "audio", "tensors": "tensors"}
_KEY = re.compile(
    rf"({'|'.join(_FOLDERS.values())})/\d{{4}}/\d{{2}}/\d{{2}}/[A-Za-z0-9_-]{{1,128}}-\d{{1,4}}"
    rf"\.({'|'.join(CONTENT_TYPES)})",
    re.ASCII,
)


def object_key(request: GenerationRequest, index: int, mime_type: str, now: datetime | None = None) -> str:
    """The key of a request's file number `index`, such as `images/2026/11/21/<request id>-0.png`."""
    day = f"{now or datetime.now(UTC):%Y/%m/%d}"
    key = f"{_FOLDERS[request.output.kind]}/{day}/{request.request_id}-{index}.{_EXTENSIONS[mime_type]}"
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key: the request id may have letters, digits, - and _ only")
    return key


def known_shape(key: str) -> str:
    """Refuse what `object_key` cannot have made: nothing else in the folder or bucket can be reached."""
    if not _KEY.fullmatch(key):
        raise ObjectNotFoundError(f"there is no file {key[:200]!r}")
    return key


def content_type_of(key: str) -> str:
    """As its ending says; raises ObjectNotFoundError for what is no key."""
    return CONTENT_TYPES[known_shape(key).rpartition(".")[2]]


def day_of(key: str) -> float:
    """When the day began on which the key was made, as Unix time in seconds; what it names does not change after."""
    return datetime.strptime("/".join(known_shape(key).split("/")[1:4]), "%Y/%m/%d").replace(tzinfo=UTC).timestamp()


def file_url(base_url: str, key: str) -> str:
    """The address of an object that leaves through this server; without `base_url` a path below its route prefix."""
    return f"{base_url}/v1/files/{key}"
