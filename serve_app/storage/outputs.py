"""Stores what one request made: a key, a file and its description for each of its files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from deployments.messages import GenerationRequest, Media, MediaFile
from serve_app.storage.base import StorageBackend
from serve_app.storage.keys import object_key


@dataclass(frozen=True)
class StoredFile:
    """A file that a request made; `upload_pending`: it still waits in the spool of the machine that made it."""

    number: int  # of the request's files
    key: str  # in the storage
    content_type: str
    num_bytes: int
    sha256: str  # hexadecimal
    seed: int
    width: int  # pixels
    height: int  # pixels
    num_frames: int
    fps: float | None
    upload_pending: bool


@dataclass(frozen=True)
class OutputURLs:
    """Where callers get stored outputs; `base_url` is the address, with the prefix, that they reach this server by."""

    storage: StorageBackend
    base_url: str

    def of(self, key: str) -> str:
        url = self.storage.url_of(key)
        return f"{self.base_url}{url}" if url.startswith("/") else url

    def below(self, base_url: str | None) -> OutputURLs:
        """The same below another address; None: this one."""
        return OutputURLs(self.storage, base_url or self.base_url)


async def store_media(
    storage: StorageBackend, request: GenerationRequest, media: Media, day: datetime | None = None
) -> list[StoredFile]:
    """All files of `media`, one after another. `day` is a part of the keys; None: today. Raises StorageError."""
    return [await _store(storage, request, index, file, day) for index, file in enumerate(media.files)]


async def _store(
    storage: StorageBackend, request: GenerationRequest, index: int, file: MediaFile, day: datetime | None
) -> StoredFile:
    key = object_key(request, index, file.mime_type, day)
    metadata = {"model": request.model, "seed": str(request.seed), "request-id": request.request_id}
    stored = await storage.store(key, file.data, file.mime_type, metadata)
    return StoredFile(
        index, key, file.mime_type, stored.num_bytes, stored.sha256, request.seed,
        file.width, file.height, file.num_frames, file.fps, stored.upload_pending,
    )  # fmt: skip
