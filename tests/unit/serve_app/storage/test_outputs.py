"""Storing what was made while the storage fails: for a caller who waits, and for a job that does not give up."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.errors import StorageError
from deployments.messages import Media, MediaFile
from serve_app.storage import outputs
from serve_app.storage.base import StoredObject
from serve_app.storage.local import LocalStorage
from serve_app.storage.outputs import store_media, store_media_in_the_end
from tests.support.stored_files import NOW, generation

MEDIA = Media(tuple(MediaFile(name, "image/png", 32, 32) for name in (b"one", b"two")))


class Full(LocalStorage):
    """A volume that is full for so many calls."""

    num_failures = 0

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        if self.num_failures:
            self.num_failures -= 1
            raise StorageError("no space left on device")
        return await super().store(key, data, content_type, metadata)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Full:
    monkeypatch.setattr(outputs, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(outputs, "LONGEST_PAUSE_S", 0.002)
    return Full(tmp_path)


async def test_a_volume_that_has_room_again_in_time_fails_no_caller(storage: Full) -> None:
    storage.num_failures = 3
    stored = await store_media(storage, generation("a"), MEDIA, NOW)
    assert [(await storage.load(file.key))[0] for file in stored] == [b"one", b"two"]


async def test_a_caller_waits_only_so_long(storage: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "PATIENCE_S", 0.05)
    storage.num_failures = 10_000
    with pytest.raises(StorageError, match="no space"):
        await store_media(storage, generation("a"), MEDIA, NOW)


async def test_a_job_waits_until_there_is_room_and_says_so_once(storage: Full, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "PATIENCE_S", 0.0)
    storage.num_failures = 100
    told = []

    async def tell(error: StorageError) -> None:
        told.append(str(error))

    stored = await store_media_in_the_end(storage, generation("a"), MEDIA, NOW, tell)
    assert (len(stored), told) == (2, ["no space left on device"])
