"""Where benchmarks write what they found, and on what machine it was."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCS = Path("docs/benchmarks")
RAW = Path("outputs/benchmarks")  # not in git


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def table_in(text: str, name: str) -> list[str]:
    """The lines of a page between the markers of a table."""
    found = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, flags=re.S)
    assert found is not None, f"no place for the table {name!r}"
    return found[1].splitlines()


def filled(text: str, name: str, lines: Sequence[str]) -> str:
    """The page with these lines between the markers of the table."""
    table_in(text, name)
    between = "".join(f"{each}\n" for each in lines)
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{between}{found[2]}", text, flags=re.S)


def write(name: str, result: dict[str, Any], lines: list[str], folder: Path = DOCS) -> None:
    """`result` with today's date as NAME.json in the folder of raw figures, `lines` as NAME.md, also printed."""
    RAW.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    dated = {"date": datetime.now(UTC).date().isoformat()} | result
    (RAW / f"{name}.json").write_text(json.dumps(dated, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
