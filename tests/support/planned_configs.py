"""What the plan says of each configuration for a GPU: in its own comment, and in the table of docs/gpu.md.

python -m tests.support.planned_configs    writes both anew
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import filled, table
from deployments.plan.budget import needed
from deployments.plan.cards import Card, card_of
from deployments.plan.measured import Measured
from serve_app.app import AppArgs
from serve_app.tools.fits import demanded, needs
from tests.support.measured_published import kept_measurement

ROOT = Path(__file__).resolve().parents[2]
FOLDER, PAGE = ROOT / "ray_configs", ROOT / "docs" / "gpu.md"
MARK = re.compile(
    r"^# By the plan \(python -m serve_app\.tools\.plan --config FILE --gpu (\S+)\), not measured:$", re.M
)
HEADS = ("configuration", "card", "placement", "GB in all, one request", "most merged", "GB with these")


def planned_files() -> dict[Path, Card]:
    """The configurations that have a plan, each with the card that it is for."""
    found = {file: MARK.search(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.rglob("serve_*.yaml"))}
    return {file: card_of(match[1]) for file, match in found.items() if match}


def application_of(file: Path) -> tuple[dict[str, Any], AppArgs, Measured]:
    """The file's application, its args, and what was measured of its model at the default size."""
    [application] = yaml.safe_load(file.read_text(encoding="utf-8"))["applications"]
    args = AppArgs.model_validate(application["args"])
    return application, args, kept_measurement(args.model)


def comment(file: Path) -> list[str]:
    """The lines of the file's comment that the plan wrote, without their marks."""
    text = file.read_text(encoding="utf-8")
    match = MARK.search(text)
    lines = text[match.end() + 1 :].splitlines() if match else []
    return [line[4:] for line in lines[: next(n for n, line in enumerate(lines) if not line.startswith("#   "))]]


def planned_comment(file: Path, card: Card) -> list[str]:
    application, args, measured = application_of(file)
    return [piece for line in needs(measured, args, application, card) for piece in wrapped(line)]


def wrapped(line: str, width: int = 114) -> Iterator[str]:
    """A line of a comment is at most 120 characters long, with its mark."""
    rest = line
    while len(rest) > width:
        at = rest.rindex(" ", 0, width)
        yield rest[:at]
        rest = f"  {rest[at + 1 :]}"
    yield rest


def rows() -> Iterator[list[str]]:
    """Of the table in docs/gpu.md."""
    for file, card in planned_files().items():
        application, args, measured = application_of(file)
        merged = args.denoising.max_batch_size
        lone, most = (needed(demanded(measured, args, application, size)) for size in (1, merged))
        place = f"[{file.stem.removeprefix('serve_')}](../{file.relative_to(ROOT)})"
        yield [
            place,
            f"{len(lone)} x {card.name}" if len(lone) > 1 else card.name,
            args.placement,
            " + ".join(f"{lone[n] / 1e9:.1f}" for n in sorted(lone)) + f" of {card.num_bytes / 1e9:.1f}",
            str(merged),
            " + ".join(f"{most[n] / 1e9:.1f}" for n in sorted(most)),
        ]


def planned_table() -> list[str]:
    return table(HEADS, rows())


def main() -> None:
    for file, card in planned_files().items():
        text = file.read_text(encoding="utf-8")
        match = MARK.search(text)
        assert match is not None
        before, after = text[: match.end() + 1], text[match.end() + 1 :].splitlines(keepends=True)
        kept = after[len(comment(file)) :]
        lines = [f"#   {line}\n" for line in planned_comment(file, card)]
        file.write_text(before + "".join(lines) + "".join(kept), encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), "plan", planned_table()), encoding="utf-8")


if __name__ == "__main__":
    main()
