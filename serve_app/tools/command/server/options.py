"""The options of every command that asks a server, and the server that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from serve_app.tools.command.server.client import Server

HERE = "http://127.0.0.1:8000"

key_option = click.option(
    "--api-key-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Holds the server's API key. Default: the variable OPENAI_API_KEY.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")


def asks_a_server(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--url`, `--api-key-file` and `--json`."""
    url = click.option("--url", default=HERE, show_default=True, metavar="URL", help="The server.")
    return url(key_option(json_option(command)))


@contextmanager
def opened(url: str, api_key_file: Path | None) -> Iterator[Server]:
    """The client's library is imported here."""
    from serve_app.tools.command.server.client import server_at

    with server_at(url, api_key_file) as server:
        yield server
