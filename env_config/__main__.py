"""`python -m env_config`: the values in effect here, the reference table, the check of a Serve config."""

import argparse
import logging
import sys
from dataclasses import astuple
from pathlib import Path

from env_config.section import EnvConfigError
from env_config.serve_config import check_serve_config
from env_config.told.effective import effective_values
from env_config.told.reference import reference, write_reference
from env_config.variables import EnvConfig


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 when a value or a file is refused."""
    parser = argparse.ArgumentParser(prog="python -m env_config", description=__doc__)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--reference", action="store_true", help="print the documentation table in Markdown")
    task.add_argument("--write-reference", metavar="FILE.md", type=Path, help="refresh the table in a Markdown file")
    task.add_argument("--check", metavar="FILE.yaml", type=Path, nargs="+", help="check Serve config files")
    options = parser.parse_args(arguments)
    if options.check:
        return print_checks(options.check)
    if options.write_reference:
        write_reference(options.write_reference)
        return 0
    if options.reference:
        print(reference(), end="")
        return 0
    return print_effective_values()


def print_effective_values() -> int:
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    try:
        rows = effective_values(EnvConfig.from_environ())
    except EnvConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(as_columns([("variable", "value", "source"), *(astuple(row) for row in rows)]))
    return 0


def as_columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def print_checks(files: list[Path]) -> int:
    errors = {file: check_serve_config(file) for file in files}
    for file, lines in errors.items():
        print("\n".join(lines) or f"{file}: ok")
    return 1 if any(errors.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
