"""The compilers' caches lie below the cache root, whatever torch has chosen before."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from env_config.library_caches import set_library_caches

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def test_a_folder_that_torch_chose_by_itself_gives_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It writes its default into the environment when something imports its compiler."""
    monkeypatch.setenv(VARIABLE, f"{tempfile.gettempdir()}/torchinductor_somebody")
    assert set_library_caches(tmp_path)[VARIABLE] == str(tmp_path / "torchinductor")


def test_a_folder_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "/a/folder")
    assert set_library_caches(tmp_path)[VARIABLE] == "/a/folder"
