"""Outputs when the storage fails: kept, served, uploaded later, deleted; also with a real S3 server that is killed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from deployments.errors import StorageError
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.s3 import LocalStorage, S3Storage, StoredObject
from serve_app.storage.spool import SpooledStorage, SpoolUploads
from tests.support.s3_server import S3Server, s3_server

KEY = "videos/2026/11/21/video_1-0.mp4"
OTHER = "videos/2026/11/21/video_2-0.mp4"
DATA = bytes(range(256)) * 10


class Flaky(LocalStorage):
    """A storage that fails as long as `is_down`."""

    is_shared = True
    is_down = False

    async def check(self) -> None:
        self._fail()

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        self._fail()
        return await super().store(key, data, content_type, metadata)

    async def load(self, key: str) -> tuple[bytes, str]:
        self._fail()
        return await super().load(key)

    async def delete(self, key: str) -> None:
        self._fail()
        await super().delete(key)

    def _fail(self) -> None:
        if self.is_down:
            raise StorageError("it is down")


class Setting:
    """A storage that can fail, its spool, and what was told to have been uploaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backend = Flaky(folder / "bucket")
        self.uploaded: list[str] = []
        self.restart()

    def restart(self, place: str = "here") -> None:
        self.storage = SpooledStorage(self.backend, self.folder / "spool", place=place)
        self.uploads = SpoolUploads(self.storage, self.note)

    async def note(self, key: str) -> None:
        self.uploaded.append(key)

    async def store(self, key: str = KEY) -> StoredObject:
        return await self.storage.store(key, DATA, "video/mp4", {"seed": "7"})

    def left(self) -> list[str]:
        return [path.name for path in (self.folder / "spool").iterdir() if not path.name.startswith(".")]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


async def test_what_the_storage_takes_is_not_kept_here(setting: Setting) -> None:
    assert not (await setting.store()).upload_pending
    assert setting.left() == []


async def test_what_it_does_not_take_is_served_from_here_also_after_a_restart(setting: Setting) -> None:
    setting.backend.is_down = True
    stored = await setting.store()
    setting.restart()
    assert (stored.upload_pending, stored.url) == (True, f"/v1/files/{KEY}")
    assert stored.sha256 == hashlib.sha256(DATA).hexdigest()
    assert await setting.storage.load(KEY) == (DATA, "video/mp4")
    assert not await setting.uploads.round()
    assert setting.uploaded == []


async def test_it_is_uploaded_once_the_storage_is_back(setting: Setting) -> None:
    setting.backend.is_down = True
    await setting.store()
    await setting.store(OTHER)
    setting.restart()
    setting.backend.is_down = False
    assert await setting.uploads.round()
    assert sorted(setting.uploaded) == [KEY, OTHER]
    assert await setting.backend.load(KEY) == (DATA, "video/mp4")
    assert setting.left() == []


async def test_it_stays_until_the_upload_is_written_down(setting: Setting) -> None:
    setting.backend.is_down = True
    await setting.store()
    setting.backend.is_down = False

    async def fail(key: str) -> None:
        raise StorageError("the job store is away")

    setting.uploads.on_uploaded = fail
    assert not await setting.uploads.round()
    setting.uploads.on_uploaded = setting.note
    assert await setting.uploads.round()
    assert setting.uploaded == [KEY]


async def test_what_is_deleted_while_it_waits_is_never_uploaded(setting: Setting) -> None:
    setting.backend.is_down = True
    await setting.store()
    await setting.storage.delete(KEY)
    with pytest.raises(ObjectNotFoundError):
        await setting.storage.load(KEY)
    setting.backend.is_down = False
    assert await setting.uploads.round()
    assert setting.uploaded == []
    with pytest.raises(ObjectNotFoundError):
        await setting.backend.load(KEY)
    assert setting.left() == []


async def test_what_is_deleted_while_the_storage_is_down_is_gone_when_it_is_back(setting: Setting) -> None:
    await setting.store()
    setting.backend.is_down = True
    await setting.storage.delete(KEY)
    with pytest.raises(ObjectNotFoundError):
        await setting.storage.load(KEY)
    setting.backend.is_down = False
    assert await setting.uploads.round()
    with pytest.raises(ObjectNotFoundError):
        await setting.backend.load(KEY)


async def test_an_upload_under_way_does_not_bring_back_what_is_deleted_meanwhile(setting: Setting) -> None:
    setting.backend.is_down = True
    await setting.store()
    setting.backend.is_down = False
    started, go_on = asyncio.Event(), asyncio.Event()
    store = setting.backend.store

    async def slow(*arguments: object) -> StoredObject:
        started.set()
        await go_on.wait()
        return await store(*arguments)  # type: ignore[arg-type]

    setting.backend.store = slow  # type: ignore[method-assign]
    upload = asyncio.create_task(setting.uploads.round())
    await started.wait()
    await setting.storage.delete(KEY)
    go_on.set()
    await upload
    with pytest.raises(ObjectNotFoundError):
        await setting.backend.load(KEY)


async def test_one_process_at_a_time_uploads(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.storage.spool.IDLE_PAUSE_S", 0.01)
    first = asyncio.create_task(setting.uploads.run())
    await asyncio.sleep(0.1)
    setting.restart()
    rounds = 0

    async def count() -> bool:
        nonlocal rounds
        rounds += 1
        return True

    setting.uploads.round = count  # type: ignore[method-assign]
    second = asyncio.create_task(setting.uploads.run())
    await asyncio.sleep(0.1)
    assert rounds == 0
    first.cancel()
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)


async def test_a_replica_starts_without_a_storage_only_if_it_has_worked_before(setting: Setting) -> None:
    setting.backend.is_down = True
    with pytest.raises(StorageError):
        await setting.storage.check()
    setting.backend.is_down = False
    await setting.storage.check()
    setting.backend.is_down = True
    setting.restart()
    await setting.storage.check()
    setting.restart(place="another bucket")
    with pytest.raises(StorageError):
        await setting.storage.check()


# --- a real server ---


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        server.create_bucket("outputs")
        yield server


async def test_a_killed_s3_server_has_the_object_and_its_checksum_when_it_is_back(s3: S3Server, tmp_path: Path) -> None:
    with closing(S3Storage(s3.cloud_storage("outputs"), attempts=1)) as backend:
        storage = SpooledStorage(backend, tmp_path)
        uploads = SpoolUploads(storage, lambda key: asyncio.sleep(0))
        s3.kill()
        stored = await storage.store(KEY, DATA, "video/mp4", {"seed": "7"})
        assert stored.upload_pending
        assert not await uploads.round()
        await asyncio.to_thread(s3.start)
        assert await uploads.round()
        with closing(s3.client()) as client:
            found = client.get_object(Bucket="outputs", Key=KEY)
            assert hashlib.sha256(found["Body"].read()).hexdigest() == stored.sha256
            assert (found["ContentType"], found["Metadata"]) == ("video/mp4", {"seed": "7"})
            s3.kill()
            await storage.delete(KEY)
            await asyncio.to_thread(s3.start)
            assert await uploads.round()
            with pytest.raises(ClientError, match="NoSuchKey"):
                client.get_object(Bucket="outputs", Key=KEY)
