"""Stores what one request made: a key, a file and its description for each of its files."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from deployments import tracing
from deployments.errors import StorageError
from deployments.messages import GenerationRequest, Media, MediaFile, play_time
from serve_app.storage.base import StorageBackend, StoredObject
from serve_app.storage.keys import object_key

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # between tries to store one file; each is twice as long as the last
PATIENCE_S = 10.0  # of a caller who waits for the answer

OnTrouble = Callable[[StorageError], Awaitable[None]]  # told of the first failure


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
    sample_rate: int | None = None  # samples per second of its sound; None: it has none
    channels: int | None = None  # of its sound
    num_samples: int | None = None  # of each channel

    @property
    def seconds(self) -> float | None:
        """How long it plays; None for what does not play."""
        return play_time(self.num_frames, self.fps, self.num_samples, self.sample_rate)


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
    """All files of `media`, one after another. `day` is a part of the keys; None: today.

    What fails is tried again for PATIENCE_S. Raises StorageError.
    """
    give_up_at = time.monotonic() + PATIENCE_S

    async def give_up(error: StorageError, pause_s: float) -> None:
        if time.monotonic() + pause_s > give_up_at:
            raise error

    return [await _store(storage, request, media, index, day, give_up) for index in range(len(media.files))]


async def store_media_in_the_end(
    storage: StorageBackend, request: GenerationRequest, media: Media, day: datetime, on_trouble: OnTrouble
) -> list[StoredFile]:
    """The same, tried again however long that is: a full volume, a denied access or a lost server can be mended."""
    is_told = False

    async def tell_once(error: StorageError, pause_s: float) -> None:
        nonlocal is_told
        if not is_told:
            is_told = True
            await on_trouble(error)

    return [await _store(storage, request, media, index, day, tell_once) for index in range(len(media.files))]


OnFailure = Callable[[StorageError, float], Awaitable[None]]  # told the error and the pause; it may raise


async def _store(
    storage: StorageBackend,
    request: GenerationRequest,
    media: Media,
    index: int,
    day: datetime | None,
    on_failure: OnFailure,
) -> StoredFile:
    file = media.files[index]
    key = object_key(request, index, file.mime_type, day)
    metadata = {"model": request.model, "seed": str(request.seed), "request-id": request.request_id}
    metadata |= _made(media, file)
    with tracing.span("store", request_id=request.request_id, content_type=file.mime_type) as span:
        stored = await _stored(storage, key, file, metadata, on_failure)
        span.set(bytes_out=stored.num_bytes, upload_pending=stored.upload_pending)
    return _stored_file(stored, request, media, index)


async def _stored(
    storage: StorageBackend, key: str, file: MediaFile, metadata: dict[str, str], on_failure: OnFailure
) -> StoredObject:
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await storage.store(key, file.data, file.mime_type, metadata)
        except StorageError as error:
            tracing.current().event("storing failed", waiting_s=pause_s)
            await on_failure(error, pause_s)
            logger.warning("%s is kept in memory and stored again in %g s: %s", key, pause_s, error)
            await asyncio.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)


def _stored_file(stored: StoredObject, request: GenerationRequest, media: Media, index: int) -> StoredFile:
    file = media.files[index]
    return StoredFile(
        index, stored.key, file.mime_type, stored.num_bytes, stored.sha256, request.seed,
        file.width, file.height, file.num_frames, file.fps, stored.upload_pending,
        media.num_steps, file.sample_rate, file.channels, file.num_samples,
    )  # fmt: skip


def _made(media: Media, file: MediaFile) -> dict[str, str]:
    """What was made, for the headers of an object: plain ASCII."""
    made = {"size": f"{file.width}x{file.height}"} if file.width else {}
    if media.num_steps is not None:
        made["steps"] = str(media.num_steps)
    if file.fps:
        made |= {"frames": str(file.num_frames), "fps": f"{file.fps:g}"}
    if file.seconds is not None:
        made["seconds"] = f"{file.seconds:g}"
    if file.sample_rate is not None:
        made |= {"sample-rate": str(file.sample_rate), "channels": str(file.channels)}
    if media.warnings:
        made["warnings"] = ",".join(dict.fromkeys(warning.code for warning in media.warnings))
    return made
