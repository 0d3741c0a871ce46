"""Outputs that the storage did not take are kept on this machine and uploaded later: nothing made is lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from filelock import FileLock, Timeout

from deployments.errors import StorageError
from deployments.metrics.meter import NO_METER, Meter
from serve_app.bounded_threads import BoundedThreads, ThreadsExhaustedError
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.base import StorageBackend, StoredObject
from serve_app.storage.guarded import OF_CALLERS, OF_UPLOADS, Breaker, GuardedStorage
from serve_app.storage.keys import content_type_of, file_url, known_shape
from serve_app.storage.local import write_whole

logger = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between rounds of uploads, while the storage fails
IDLE_PAUSE_S = 2.0
MAX_THREADS = 8
MAX_FAILURES_PER_ROUND = 2  # the storage is down, not one object bad
VERSION = 1  # of an entry; one without a version is of version 0, which could not show whether it was whole
SET_ASIDE = "set_aside"  # the folder of entries that cannot be uploaded, in the spool's own

OnUploaded = Callable[[str], Awaitable[None]]  # told the key; a StorageError keeps the entry


class DamagedEntryError(Exception):
    """An entry of the spool that no later try can upload."""


@dataclass(frozen=True)
class Entry:
    """An object that waits in the spool."""

    data: bytes
    content_type: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class Waiting:
    """What a spool has at one moment."""

    entries: dict[str, int]  # upload, delete, set_aside
    num_bytes: int
    oldest_s: float  # since the last try with the one that waits longest for one; 0 without any


class SpooledStorage:
    """A storage that is shared between machines, with a folder of this machine for when it fails.

    An entry is two files, named by the object's key: the bytes and, written after them, what goes with them.
    Objects to be deleted while the storage fails leave a mark instead. A damaged entry is set aside in a folder
    of the spool and holds up no other. `place` names the storage as it is configured now. Callers wait for the
    storage a few seconds, uploads from the spool longer, and neither where it does not answer. What waits in
    `earlier_folders`, those of earlier versions of the application, is moved here once nobody uploads from there.
    """

    def __init__(
        self,
        backend: StorageBackend,
        folder: Path,
        base_url: str = "",
        place: str = "",
        earlier_folders: Callable[[], Iterable[Path]] = tuple,
        meter: Meter = NO_METER,
    ) -> None:
        self.breaker = Breaker()
        self.meter = meter
        self.backend = GuardedStorage(backend, OF_CALLERS, self.breaker, may_try=False, meter=meter)
        self.for_uploads = GuardedStorage(backend, OF_UPLOADS, self.breaker, meter=meter, way="spool")
        self.threads = BoundedThreads("spool", MAX_THREADS)
        self.folder = folder
        self.place = hashlib.sha256(place.encode()).hexdigest()
        self.base_url = base_url.rstrip("/")
        self.is_shared = backend.is_shared
        self.earlier_folders = earlier_folders
        folder.mkdir(parents=True, exist_ok=True)

    async def check(self) -> None:
        """Raises StorageError, unless the same storage has worked before: then it is down, and the spool serves."""
        await self.threads.run(self.adopt)
        known = self.folder / ".checked"
        try:
            await self.for_uploads.check()
        except StorageError as error:
            if not known.exists() or known.read_bytes() != self.place.encode():
                raise
            logger.warning("starting although the storage does not answer, it has worked before: %s", error)
        else:
            await self.threads.run(write_whole, known, self.place.encode())

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        known_shape(key)
        try:
            return await self.backend.store(key, data, content_type, metadata)
        except StorageError as error:
            logger.warning("%s waits in the spool, because %s", key, error)
            refusal = error
        try:
            await self.threads.run(self._write, key, data, content_type, metadata)
        except (OSError, ThreadsExhaustedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StorageError(f"neither the storage ({refusal}) nor the spool ({reason}) took the output") from error
        self.meter.count("triptych_spooled_total")
        return StoredObject(self.url_of(key), key, len(data), hashlib.sha256(data).hexdigest(), upload_pending=True)

    def url_of(self, key: str) -> str:
        return file_url(self.base_url, key) if self._entry(key).exists() else self.backend.url_of(key)

    async def load(self, key: str) -> tuple[bytes, str]:
        entry = self._entry(known_shape(key))
        if self._mark(key).exists():
            raise ObjectNotFoundError(f"there is no file {key[:200]!r}")
        try:
            found = await self.threads.run(_read, entry, key)
        except FileNotFoundError:
            pass  # it was taken, also at this moment
        except (DamagedEntryError, OSError, ThreadsExhaustedError) as error:
            logger.warning("%s is not served from the spool: %s", key, error)
        else:
            return found.data, found.content_type
        return await self.backend.load(key)

    async def delete(self, key: str) -> None:
        """At once, or as soon as the storage answers again."""
        try:
            if not self._entry(key).exists():
                await self.backend.delete(key)
                return
        except StorageError as error:
            logger.warning("%s will be deleted later, because %s", key, error)
        try:
            # The uploader also deletes marked objects: it cannot upload one after its deletion.
            await self.threads.run(write_whole, self._mark(key), b"")
            await self.threads.run(_remove, self._entry(key))
        except (OSError, ThreadsExhaustedError) as error:
            raise StorageError(f"{key} could not be marked in the spool as deleted: {error}") from error

    def adopt(self) -> None:
        """Move what waits in the earlier folders here: the bytes of each entry before the text that makes it one."""
        for folder in self.earlier_folders():
            lock = FileLock(folder / ".lock", thread_local=False)
            if _acquired(lock):
                try:
                    for ending in ("*.data", "*.json", "*.delete"):
                        for file in folder.glob(ending):
                            file.replace(self.folder / file.name)
                            logger.info("%s was taken over from the spool %s", file.name, folder)
                finally:
                    lock.release()

    def pending(self) -> list[str]:
        """Keys that are still to be uploaded, those that failed last at the end."""
        return [unquote(entry.stem) for entry in sorted(self.folder.glob("*.json"), key=_modified)]

    async def tell(self) -> None:
        """What waits here, to the meter."""
        self.backend.tell()
        found = await self.threads.run(self._look)
        for entry, count in found.entries.items():
            self.meter.set("triptych_spool_entries", count, entry=entry)
        self.meter.set("triptych_spool_bytes", found.num_bytes)
        self.meter.set("triptych_spool_oldest_seconds", found.oldest_s)

    def _look(self) -> Waiting:
        files = [(file.suffix, status) for file in self.folder.iterdir() if (status := _status(file)) is not None]
        uploads = [status.st_mtime for suffix, status in files if suffix == ".json"]
        entries = {
            "upload": len(uploads),
            "delete": sum(suffix == ".delete" for suffix, _ in files),
            "set_aside": len(list((self.folder / SET_ASIDE).glob("*.json"))),
        }
        num_bytes = sum(status.st_size for suffix, status in files if suffix in (".json", ".data"))
        return Waiting(entries, num_bytes, max(0.0, time.time() - min(uploads)) if uploads else 0.0)

    def _write(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> None:
        entry = self._entry(key)
        about = {
            "version": VERSION,
            "content_type": content_type,  # version 0 reads it
            "metadata": metadata,
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        entry.unlink(missing_ok=True)  # so that no reader takes the old text for that of the new bytes
        write_whole(entry.with_suffix(".data"), data)
        write_whole(entry, json.dumps(about).encode())

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
            if await self._safe_round(lock):
                pause_s = FIRST_PAUSE_S
                await asyncio.sleep(IDLE_PAUSE_S)
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _safe_round(self, lock: FileLock) -> bool:
        try:
            if self.storage.breaker.is_open:  # every process finds out for itself, in place of its callers
                await self.storage.for_uploads.check()
            if not _acquired(lock):
                return True
            await self.storage.threads.run(self.storage.adopt)
            return await self.round()
        except StorageError as error:
            logger.warning("outputs still go to the spool: %s", error)
            return False
        except Exception:  # if this ended, outputs would wait for ever in a replica that looks healthy
            logger.exception("the spool could not be looked through; trying again")
            return False

    async def round(self) -> bool:
        """Try what is pending, and what is to be deleted; returns whether the storage took it."""
        failures = 0
        for work, keys in ((self._upload, self.storage.pending), (self._delete, self._marked)):
            for key in keys():
                try:
                    await self._work_or_set_aside(work, key)
                    failures = 0
                except (StorageError, OSError) as error:
                    failures += 1
                    logger.warning("%s still waits in the spool: %s", key, error)
                if failures >= MAX_FAILURES_PER_ROUND:
                    return False
        return failures == 0

    async def _work_or_set_aside(self, work: Callable[[str], Awaitable[None]], key: str) -> None:
        try:
            await work(key)
        except (DamagedEntryError, ObjectNotFoundError) as error:
            await self.storage.threads.run(self._set_aside, key, error)

    async def _upload(self, key: str) -> None:
        entry = self.storage._entry(key)
        try:
            found = await self.storage.threads.run(_read, entry, key)
        except FileNotFoundError:
            return  # deleted meanwhile
        try:
            await self.storage.for_uploads.store(key, found.data, found.content_type, found.metadata)
        except StorageError:
            if entry.exists():
                os.utime(entry)  # to the end of the queue
            raise
        await self.on_uploaded(key)
        _remove(entry)
        logger.info("%s was uploaded from the spool", key)

    async def _delete(self, key: str) -> None:
        await self.storage.for_uploads.delete(key)
        self.storage._mark(key).unlink(missing_ok=True)

    def _set_aside(self, key: str, error: Exception) -> None:
        folder = self.storage.folder / SET_ASIDE
        folder.mkdir(exist_ok=True)
        entry = self.storage._entry(key)
        for file in (entry, entry.with_suffix(".data"), self.storage._mark(key)):
            with contextlib.suppress(FileNotFoundError):  # it has no such file, or it was deleted meanwhile
                file.rename(folder / file.name)
        logger.error("%s is set aside in %s, it cannot be uploaded: %s", key, folder, error)

    def _marked(self) -> list[str]:
        return [unquote(mark.stem) for mark in self.storage.folder.glob("*.delete")]


def _acquired(lock: FileLock) -> bool:
    """Held until this process ends, or until it is released."""
    try:
        if not lock.is_locked:
            lock.acquire(blocking=False)
        return True
    except Timeout:
        return False


def _read(entry: Path, key: str) -> Entry:
    """The entry of `key`. Raises FileNotFoundError if it is not there (any more), and DamagedEntryError."""
    text = entry.read_bytes()
    try:
        data = entry.with_suffix(".data").read_bytes()
        return _entry(text, data, known_shape(key))
    except (FileNotFoundError, ValueError, ObjectNotFoundError) as error:
        if entry.read_bytes() != text:  # it was replaced while it was read
            raise FileNotFoundError(str(entry)) from error
        raise DamagedEntryError(str(error)) from error


def _entry(text: bytes, data: bytes, key: str) -> Entry:
    """An entry of any version; what it does not say follows from the key. Raises ValueError for a damaged one."""
    about = json.loads(text)
    if not isinstance(about, dict):
        raise ValueError("what goes with its bytes is no JSON object")
    if about.get("version", 0) not in (0, VERSION):
        logger.warning("the spooled %s of version %r is read as one of version %d", key, about["version"], VERSION)
    if about.get("num_bytes", len(data)) != len(data):
        raise ValueError(f"it has {len(data)} bytes, not {about['num_bytes']}")
    if "sha256" in about and about["sha256"] != hashlib.sha256(data).hexdigest():
        raise ValueError("its bytes are not those that were written")
    metadata = about.get("metadata")
    known = {str(name): str(value) for name, value in metadata.items()} if isinstance(metadata, dict) else {}
    return Entry(data, content_type_of(key), known)


def _remove(entry: Path) -> None:
    entry.unlink(missing_ok=True)
    entry.with_suffix(".data").unlink(missing_ok=True)


def _modified(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _status(file: Path) -> os.stat_result | None:
    """None where it was taken meanwhile."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None
