"""What the pages name is there: links, files and folders, modules that are run."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "checkpoints").glob("*.md"), *(ROOT / "docs").rglob("*.md")],
    key=lambda page: str(page),
)
FOLDERS = "serve_app|deployments|env_config|benchmarks|tests|docs|ray_configs|checkpoints"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
MODULE = re.compile(rf"python -m ((?:{FOLDERS})(?:\.\w+)*)")


def dead_links(page: Path) -> list[str]:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    return [link for link in links if "://" not in link and not (page.parent / link).exists()]


def missing_paths(page: Path) -> list[str]:
    """A path with NAME in it is one that the reader is to write."""
    paths = PATH.findall(page.read_text(encoding="utf-8"))
    return [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


def missing_modules(page: Path) -> list[str]:
    modules = MODULE.findall(page.read_text(encoding="utf-8"))
    return [module for module in modules if module != "benchmarks.NAME" and find_spec(module) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    assert dead_links(page) == []
    assert missing_paths(page) == []
    assert missing_modules(page) == []


def test_names_of_what_is_not_there_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[a](missing.md) [b](page.md#part) `serve_app/missing.py` `deployments/NAME.py` `serve_app/app.py` "
        "`python -m serve_app.missing` and python -m benchmarks.scale\n"
    )
    assert dead_links(page) == ["missing.md"]
    assert missing_paths(page) == ["serve_app/missing.py"]
    assert missing_modules(page) == ["serve_app.missing"]


def test_every_page_is_listed_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index] == ["README.md"]
