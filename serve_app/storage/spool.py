"""Outputs that the storage did not take are kept on this machine and uploaded later: nothing made is lost."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from deployments.errors import StorageError
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.s3 import StorageBackend, StoredObject, file_url, write_whole

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # between rounds of uploads, while the storage fails
IDLE_PAUSE_S = 2.0
MAX_FAILURES_PER_ROUND = 2  # the storage is down, not one object bad

OnUploaded = Callable[[str], Awaitable[None]]  # told the key; a StorageError keeps the entry


class SpooledStorage:
    """A storage that is shared between machines, with a folder of this machine for when it fails.

    An entry is two files, named by the object's key: the bytes and, written after them, what goes with them.
    Objects to be deleted while the storage fails leave a mark instead. `place` names the storage as it is
    configured now.
    """

    def __init__(self, backend: StorageBackend, folder: Path, base_url: str = "", place: str = "") -> None:
        self.backend = backend
        self.folder = folder
        self.place = hashlib.sha256(place.encode()).hexdigest()
        self.base_url = base_url.rstrip("/")
        self.is_shared = backend.is_shared
        folder.mkdir(parents=True, exist_ok=True)

    async def check(self) -> None:
        """Raises StorageError, unless the same storage has worked before: then it is down, and the spool serves."""
        known = self.folder / ".checked"
        try:
            await self.backend.check()
        except StorageError as error:
            if not known.exists() or known.read_text() != self.place:
                raise
            logger.warning("starting although the storage does not answer, it has worked before: %s", error)
        else:
            await asyncio.to_thread(write_whole, known, self.place.encode())

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        try:
            return await self.backend.store(key, data, content_type, metadata)
        except StorageError as error:
            logger.warning("%s waits in the spool, because %s", key, error)
        try:
            await asyncio.to_thread(self._write, key, data, content_type, metadata)
        except OSError as error:
            raise StorageError(f"neither the storage nor the spool took the output: {error.strerror}") from error
        return StoredObject(self.url_of(key), key, len(data), hashlib.sha256(data).hexdigest(), upload_pending=True)

    def url_of(self, key: str) -> str:
        return file_url(self.base_url, key) if self._entry(key).exists() else self.backend.url_of(key)

    async def load(self, key: str) -> tuple[bytes, str]:
        entry = self._entry(key)
        if self._mark(key).exists():
            raise ObjectNotFoundError(f"there is no file {key[:200]!r}")
        if entry.exists():
            try:
                data, about = await asyncio.to_thread(_read, entry)
            except FileNotFoundError:
                return await self.backend.load(key)  # it was uploaded at this moment
            return data, str(about["content_type"])
        return await self.backend.load(key)

    async def delete(self, key: str) -> None:
        """At once, or as soon as the storage answers again."""
        try:
            if not self._entry(key).exists():
                await self.backend.delete(key)
                return
        except StorageError as error:
            logger.warning("%s will be deleted later, because %s", key, error)
        # The one who uploads also deletes what is marked, so it cannot upload it after the deletion.
        await asyncio.to_thread(write_whole, self._mark(key), b"")
        _remove(self._entry(key))

    def pending(self) -> list[str]:
        """Keys that are still to be uploaded, those that failed last at the end."""
        return [unquote(entry.stem) for entry in sorted(self.folder.glob("*.json"), key=_modified)]

    def _write(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> None:
        entry = self._entry(key)
        write_whole(entry.with_suffix(".data"), data)
        write_whole(entry, json.dumps({"content_type": content_type, "metadata": metadata}).encode())

    def _entry(self, key: str) -> Path:
        return self.folder / f"{quote(key[:256], safe='')}.json"

    def _mark(self, key: str) -> Path:
        return self._entry(key).with_suffix(".delete")


@dataclass
class SpoolUploads:
    """Brings the spool to the storage; of the processes that share the folder, one at a time does it."""

    storage: SpooledStorage
    on_uploaded: OnUploaded

    async def run(self) -> None:
        """Does not end: rounds of uploads, with a longer pause after each that failed."""
        lock = FileLock(self.storage.folder / ".lock", thread_local=False)
        pause_s = FIRST_PAUSE_S
        while True:
            if not _acquired(lock) or await self.round():
                pause_s = FIRST_PAUSE_S
                await asyncio.sleep(IDLE_PAUSE_S)
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def round(self) -> bool:
        """Try what is pending, and what is to be deleted; returns whether the storage took it."""
        failures = 0
        for work, keys in ((self._upload, self.storage.pending), (self._delete, self._marked)):
            for key in keys():
                try:
                    await work(key)
                    failures = 0
                except (StorageError, OSError) as error:
                    failures += 1
                    logger.warning("%s still waits in the spool: %s", key, error)
                if failures >= MAX_FAILURES_PER_ROUND:
                    return False
        return failures == 0

    async def _upload(self, key: str) -> None:
        entry = self.storage._entry(key)
        try:
            data, about = await asyncio.to_thread(_read, entry)
        except FileNotFoundError:
            return  # deleted meanwhile
        try:
            await self.storage.backend.store(key, data, about["content_type"], about["metadata"])
        except StorageError:
            if entry.exists():
                os.utime(entry)  # to the end of the queue
            raise
        await self.on_uploaded(key)
        _remove(entry)
        logger.info("%s was uploaded from the spool", key)

    async def _delete(self, key: str) -> None:
        await self.storage.backend.delete(key)
        self.storage._mark(key).unlink(missing_ok=True)

    def _marked(self) -> list[str]:
        return [unquote(mark.stem) for mark in self.storage.folder.glob("*.delete")]


def _acquired(lock: FileLock) -> bool:
    """Held until this process ends."""
    try:
        if not lock.is_locked:
            lock.acquire(blocking=False)
        return True
    except Timeout:
        return False


def _read(entry: Path) -> tuple[bytes, dict[str, Any]]:
    about: dict[str, Any] = json.loads(entry.read_bytes())
    return entry.with_suffix(".data").read_bytes(), about


def _remove(entry: Path) -> None:
    entry.unlink(missing_ok=True)
    entry.with_suffix(".data").unlink(missing_ok=True)


def _modified(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0
