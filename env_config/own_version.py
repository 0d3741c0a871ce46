"""The version of Triptych: of the installed package, else of the sources that run."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "pyproject.toml"


def own_version() -> str:
    try:
        return version("triptych")
    except PackageNotFoundError:
        found: str = tomllib.loads(SOURCES.read_text(encoding="utf-8"))["project"]["version"]
        return found
