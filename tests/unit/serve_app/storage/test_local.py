"""The storage in a folder of this machine; its files are read by other means."""

from __future__ import annotations

import hashlib
import os

import pytest

from deployments.errors import StorageError
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.local import LocalStorage
from tests.support.stored_files import DATA, KEY


async def test_a_local_file_is_stored_whole_loaded_and_deleted(tmp_path):
    storage = LocalStorage(tmp_path / "outputs", "https://pictures.example/")

    stored = await storage.store(KEY, DATA, "image/png", {"seed": "1"})

    assert stored.url == f"https://pictures.example/v1/files/{KEY}"
    assert (stored.key, stored.num_bytes) == (KEY, len(DATA))
    assert stored.sha256 == hashlib.sha256(DATA).hexdigest()
    assert [path.name for path in (tmp_path / "outputs").rglob("*") if path.is_file()] == ["req_1-x-0.png"]
    assert (tmp_path / "outputs" / KEY).read_bytes() == DATA
    assert await storage.load(KEY) == (DATA, "image/png")
    await storage.delete(KEY)
    with pytest.raises(ObjectNotFoundError, match="there is no file"):
        await storage.load(KEY)
    await storage.delete(KEY)


async def test_without_a_public_address_the_url_is_relative(tmp_path):
    stored = await LocalStorage(tmp_path).store(KEY, DATA, "image/png", {})
    assert stored.url == f"/v1/files/{KEY}"


async def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    await storage.store(KEY, b"old", "image/png", {})

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        await storage.store(KEY, b"new", "image/png", {})
    assert str(tmp_path) not in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / KEY]
    assert (tmp_path / KEY).read_bytes() == b"old"


async def test_the_check_of_a_folder_leaves_nothing_behind(tmp_path):
    await LocalStorage(tmp_path / "outputs").check()
    assert list((tmp_path / "outputs").iterdir()) == []


async def test_a_folder_that_cannot_be_written_is_named_with_its_variable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"file/outputs.*SGLANG_DIFFUSION_CACHE_ROOT"):
        await LocalStorage(tmp_path / "file" / "outputs").check()
