"""Finished media in a folder of this machine."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from deployments.errors import StorageError
from serve_app.bounded_threads import BoundedThreads
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.base import CHECK_BYTES, CHECK_KEY, StoredObject
from serve_app.storage.keys import content_type_of, file_url, known_shape

MAX_THREADS = 16


class LocalStorage:
    """A folder of this machine; files leave through the ingress, under /v1/files/."""

    is_shared = False

    def __init__(self, folder: Path, base_url: str = "") -> None:
        self.folder = folder
        self.base_url = base_url.rstrip("/")
        self._threads = BoundedThreads("output-folder", MAX_THREADS)

    async def check(self) -> None:
        try:
            await self._threads.run(write_whole, self.folder / CHECK_KEY, CHECK_BYTES)
            await self._threads.run((self.folder / CHECK_KEY).unlink, missing_ok=True)  # another replica's too
        except OSError as error:
            raise StorageError(
                f"the output folder {str(self.folder)!r} cannot be written to ({error.strerror}); "
                "it is under SGLANG_DIFFUSION_CACHE_ROOT unless the application's arguments name another"
            ) from error

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        path = self.folder / known_shape(key)
        try:
            await self._threads.run(write_whole, path, data)
        except OSError as error:
            raise StorageError(f"the output could not be written to the local folder: {error.strerror}") from error
        return StoredObject(self.url_of(key), key, len(data), hashlib.sha256(data).hexdigest())

    def url_of(self, key: str) -> str:
        return file_url(self.base_url, key)

    async def load(self, key: str) -> tuple[bytes, str]:
        path = self.folder / known_shape(key)
        try:
            data = await self._threads.run(path.read_bytes)
        except FileNotFoundError as error:
            raise ObjectNotFoundError(f"there is no file {key!r}") from error
        except OSError as error:
            raise StorageError(f"the file {key!r} could not be read: {error.strerror}") from error
        return data, content_type_of(key)

    async def delete(self, key: str) -> None:
        path = self.folder / known_shape(key)
        try:
            await self._threads.run(path.unlink, missing_ok=True)
        except OSError as error:
            raise StorageError(f"the file {key!r} could not be deleted: {error.strerror}") from error


def write_whole(path: Path, data: bytes) -> None:
    """A reader, or a restart after a crash, sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
