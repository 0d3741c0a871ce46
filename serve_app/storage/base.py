"""What a storage is: the protocol that every place for finished media keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

URLStyle = Literal["presigned", "public", "path"]

CONTENT_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "safetensors": "application/octet-stream",
}
CHECK_KEY = "triptych-startup-check"  # of the trial object; not the shape of an output's key
CHECK_BYTES = b"written by Triptych at its start, and removed at once\n"


@dataclass(frozen=True)
class StoredObject:
    """A stored file; `url` is where a caller gets it, relative to this server if it begins with a slash."""

    url: str
    key: str
    num_bytes: int
    sha256: str  # hexadecimal
    upload_pending: bool = False  # kept in this machine's spool until the storage takes it


class StorageBackend(Protocol):
    """A place for finished media. Every method may be called from any number of tasks at once."""

    is_shared: bool  # outlives this machine, so that every output belongs there

    async def check(self) -> None:
        """Write a trial object as outputs are written, and remove it; raises StorageError that names the variable to
        correct."""
        ...

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        """Store `data` under a key of `object_key`, whole or not at all; raises StorageError.

        `metadata` is kept where the place has room for it beside the object: S3 has (2 KB), a folder has not.
        """
        ...

    def url_of(self, key: str) -> str:
        """Where a caller gets the object now; some URLs end after a while."""
        ...

    async def load(self, key: str) -> tuple[bytes, str]:
        """The bytes and the content type; raises ObjectNotFoundError or StorageError."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the object; an object that is not there is no error. Raises StorageError."""
        ...
