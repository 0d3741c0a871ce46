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
    num_steps: int | None  # scheduler steps that were made; None: not counted


async def store_media(
    storage: StorageBackend, request: GenerationRequest, media: Media, day: datetime | None = None
) -> list[StoredFile]:
    """All files of `media`, one after another. `day` is a part of the keys; None: today. Raises StorageError."""
    return [await _store(storage, request, media, index, day) for index in range(len(media.files))]


async def _store(
    storage: StorageBackend, request: GenerationRequest, media: Media, index: int, day: datetime | None
) -> StoredFile:
    file = media.files[index]
    key = object_key(request, index, file.mime_type, day)
    metadata = {"model": request.model, "seed": str(request.seed), "request-id": request.request_id}
    metadata |= _made(media, file)
    stored = await storage.store(key, file.data, file.mime_type, metadata)
    return StoredFile(
        index, key, file.mime_type, stored.num_bytes, stored.sha256, request.seed,
        file.width, file.height, file.num_frames, file.fps, stored.upload_pending,
        media.num_steps,
    )  # fmt: skip


def _made(media: Media, file: MediaFile) -> dict[str, str]:
    """What was made, for the headers of an object: plain ASCII."""
    made = {"size": f"{file.width}x{file.height}"}
    if media.num_steps is not None:
        made["steps"] = str(media.num_steps)
    if file.fps:
        made |= {"frames": str(file.num_frames), "fps": f"{file.fps:g}", "seconds": f"{file.num_frames / file.fps:g}"}
    if media.warnings:
        made["warnings"] = ",".join(dict.fromkeys(warning.code for warning in media.warnings))
    return made
