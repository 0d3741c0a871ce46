"""The version, of what is installed and of sources that are not."""

from importlib.metadata import PackageNotFoundError, version

import pytest

from env_config import own_version as told


def test_sources_that_are_not_installed_tell_the_version_that_they_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told.own_version() == version("triptych")

    def is_missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(told, "version", is_missing)
    assert told.own_version() == version("triptych")
