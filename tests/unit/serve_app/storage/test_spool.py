"""Outputs when the storage fails: kept, served, uploaded later, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.errors import StorageError
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.base import StoredObject
from serve_app.storage.local import LocalStorage
from serve_app.storage.spool import SET_ASIDE, SpooledStorage, SpoolUploads

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


@pytest.mark.parametrize("error", [RecursionError(), ValueError("no XML"), TimeoutError(), OSError(5, "I/O")])
async def test_whatever_the_storage_raises_the_output_is_kept(setting: Setting, error: Exception) -> None:
    def fail() -> None:
        raise error

    setting.backend._fail = fail  # type: ignore[method-assign]
    assert (await setting.store()).upload_pending
    assert await setting.storage.load(KEY) == (DATA, "video/mp4")


async def test_a_full_spool_is_a_storage_error_and_the_output_is_stored_when_there_is_room(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    setting.backend.is_down = True
    with monkeypatch.context() as patch:
        patch.setattr("serve_app.storage.spool.write_whole", full)
        with pytest.raises(StorageError, match=r"it is down.*No space"):
            await setting.store()
        with pytest.raises(StorageError, match="No space"):
            await setting.storage.delete(OTHER)
    assert (await setting.store()).upload_pending


# --- other names of the application ---


async def test_what_waits_under_a_former_name_is_served_and_uploaded(setting: Setting) -> None:
    setting.backend.is_down = True
    await setting.store()
    await setting.storage.delete(OTHER)
    former = (setting.folder / "spool").rename(setting.folder / "app%2Fflux-v1")
    setting.storage = SpooledStorage(setting.backend, setting.folder / "app", earlier_folders=lambda: [former])
    (setting.folder / "app" / ".checked").write_bytes(setting.storage.place.encode())
    await setting.storage.check()
    assert await setting.storage.load(KEY) == (DATA, "video/mp4")
    setting.backend.is_down = False
    setting.uploads = SpoolUploads(setting.storage, setting.note)
    assert await setting.uploads.round()
    assert setting.uploaded == [KEY]
    assert not [path for path in former.iterdir() if path.suffix in (".json", ".data", ".delete")]


async def test_a_former_spool_is_left_alone_while_its_process_uploads_from_it(setting: Setting) -> None:
    setting.backend.is_down = True
    await setting.store()
    former = setting.folder / "spool"
    new = SpooledStorage(setting.backend, setting.folder / "app", earlier_folders=lambda: [former])
    with FileLock(former / ".lock", thread_local=False):
        await asyncio.to_thread(new.adopt)
        assert new.pending() == []
    await asyncio.to_thread(new.adopt)
    assert new.pending() == [KEY]


# --- damage and other versions ---


def spooled(setting: Setting, ending: str, key: str = KEY) -> Path:
    return setting.storage._entry(key).with_suffix(ending)


async def spool_two(setting: Setting) -> None:
    """A job's two outputs, while the storage is down; it is back afterwards."""
    setting.backend.is_down = True
    await setting.store()
    await setting.store(OTHER)
    setting.backend.is_down = False


async def test_an_entry_of_the_first_version_is_served_and_uploaded(setting: Setting) -> None:
    spooled(setting, ".data").write_bytes(DATA)
    spooled(setting, ".json").write_text('{"content_type": "video/mp4", "metadata": {"seed": "7"}}')
    assert await setting.storage.load(KEY) == (DATA, "video/mp4")
    assert await setting.uploads.round()
    assert (setting.uploaded, setting.left()) == ([KEY], [])
    assert await setting.backend.load(KEY) == (DATA, "video/mp4")


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"version": 2, "content_type": "video/mp4", "metadata": {}, "expires": 3},
        {"version": 2, "content_type": ["video/mp4"], "metadata": ["seed"]},
    ],
)
async def test_an_entry_of_another_version_is_uploaded_by_what_is_known_of_it(
    setting: Setting, about: dict[str, Any]
) -> None:
    spooled(setting, ".data").write_bytes(DATA)
    spooled(setting, ".json").write_text(json.dumps(about))
    assert await setting.storage.load(KEY) == (DATA, "video/mp4")
    assert await setting.uploads.round()
    assert await setting.backend.load(KEY) == (DATA, "video/mp4")


async def test_an_entry_without_its_bytes_is_set_aside_and_holds_up_no_other(setting: Setting) -> None:
    await spool_two(setting)
    spooled(setting, ".data").unlink()
    assert await setting.uploads.round()
    assert (setting.uploaded, setting.left()) == ([OTHER], [SET_ASIDE])
    with pytest.raises(ObjectNotFoundError):
        await setting.storage.load(KEY)


@pytest.mark.parametrize("ending", [".json", ".data"])
async def test_a_cut_entry_is_set_aside_whole_and_told(
    setting: Setting, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    await spool_two(setting)
    file = spooled(setting, ending)
    file.write_bytes(file.read_bytes()[:-1])
    assert await setting.uploads.round()
    assert (setting.uploaded, setting.left()) == ([OTHER], [SET_ASIDE])
    aside = setting.folder / "spool" / SET_ASIDE
    assert sorted(path.suffix for path in aside.iterdir()) == [".data", ".json"]
    assert f"{KEY} is set aside in {aside}" in caplog.text
    assert await setting.uploads.round(), "it is left alone from now on"


async def test_an_entry_that_cannot_even_be_set_aside_ends_no_uploads(setting: Setting) -> None:
    await spool_two(setting)
    spooled(setting, ".data").unlink()
    (setting.folder / "spool" / SET_ASIDE).write_text("no folder")
    await setting.uploads.round()
    assert setting.uploaded == [OTHER]


async def test_what_is_no_key_is_set_aside(setting: Setting) -> None:
    await spool_two(setting)
    (setting.folder / "spool" / "notes.json").write_text("{}")
    (setting.folder / "spool" / "notes.data").write_text("")
    (setting.folder / "spool" / "old.delete").write_text("")
    assert await setting.uploads.round()
    assert sorted(setting.uploaded) == [KEY, OTHER]
    assert setting.left() == [SET_ASIDE]


async def test_a_damaged_note_of_the_last_check_means_check_again(setting: Setting) -> None:
    await setting.storage.check()
    (setting.folder / "spool" / ".checked").write_bytes(b"\xff")
    await setting.storage.check()
    setting.backend.is_down = True
    await setting.storage.check()


@given(place=st.integers(0), bit=st.integers(0, 7), ending=st.sampled_from([".json", ".data"]))
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_brings_other_bytes_to_the_storage_or_ends_the_uploads(
    place: int, bit: int, ending: str
) -> None:
    async def flip_and_upload() -> None:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(Path(folder))
            await spool_two(setting)
            file = spooled(setting, ending)
            data = bytearray(file.read_bytes())
            data[place % len(data)] ^= 1 << bit
            file.write_bytes(data)
            assert await setting.uploads.round()
            assert OTHER in setting.uploaded
            with contextlib.suppress(ObjectNotFoundError):
                assert (await setting.backend.load(KEY))[0] == DATA

    asyncio.run(flip_and_upload())


# --- a real server ---
