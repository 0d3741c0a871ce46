"""The generated part of docs/command.md: the help of every command, and the exit codes.

python -m serve_app.tools.command.page      writes it anew
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from serve_app.tools.command.exits import MEANINGS
from serve_app.tools.command.main import triptych

PAGE = Path(__file__).parents[3] / "docs/command.md"
BEGINS, ENDS = "<!-- made by python -m serve_app.tools.command.page -->", "<!-- end -->"
WIDTH = 100


def fresh(page: str) -> str:
    """The page with its generated part as it should be."""
    before, _, rest = page.partition(BEGINS)
    _, _, after = rest.partition(ENDS)
    return f"{before}{BEGINS}\n{generated()}{ENDS}{after}"


def generated() -> str:
    lines = ["", "## Exit codes", "", "| | |", "|---|---|"]
    lines += [f"| {int(code)} | {meaning} |" for code, meaning in MEANINGS.items()]
    for context in contexts(context_of(triptych, "triptych", None)):
        text = "\n".join(f"    {line}".rstrip() for line in context.get_help().splitlines())
        lines += ["", f"## `{context.command_path}`", "", text]
    return "\n".join([*lines, "", ""])


def contexts(context: click.Context) -> Iterator[click.Context]:
    """Of the command and all below it."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            assert command is not None
            yield from contexts(context_of(command, name, context))


def context_of(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip


if __name__ == "__main__":
    PAGE.write_text(fresh(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
