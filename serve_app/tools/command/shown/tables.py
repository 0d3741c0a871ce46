"""Tables on stdout, as wide as the terminal; into a pipe as wide as they are."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from serve_app.tools.command.shown.text import printable


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Any:
    """A table of rich; None is an empty cell."""
    from rich import box
    from rich.table import Table

    made = Table(*heads, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        made.add_row(*("" if cell is None else escaped(str(cell)) for cell in row))
    return made


def escaped(text: str) -> str:
    """Text of others for a cell: one line without markup."""
    from rich.markup import escape

    return escape(printable(text).replace("\n", " "))


def console() -> Any:
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200, highlight=False)


def ago(created_at: float | None) -> str:
    """How long it is since a Unix time."""
    if created_at is None:
        return ""
    seconds = max(0, int(time.time() - created_at))
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def at(created_at: float | None) -> str:
    return "" if created_at is None else f"{datetime.fromtimestamp(created_at):%Y-%m-%d %H:%M:%S}"
