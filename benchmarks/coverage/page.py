"""The tables of docs/models.md, made of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.coverage.exported import family_of, is_modular
from benchmarks.coverage.rows import PASSED, Row, Verdict
from benchmarks.report import filled, table

PAGE = Path("docs/models.md")
WORDS = {
    "hand_off": "bit-identical by hand-off",
    "remote_calls": "bit-identical by remote calls",
    "refused": "refused",
    "failed": "fails",
    "wrong": "**wrong**",
    "not_judged": "not judged",
}
COLUMNS: dict[str, Collection[Verdict]] = {
    "bit-identical": PASSED,
    "refused or failing": ("refused", "failed", "wrong"),
    "not judged": ("not_judged",),
}  # of the table of families
MARKS = {True: "yes", False: "no", None: ""}
MOST_FIELDS = 14  # of a row; the others are counted


def write_page(rows: Mapping[str, Row], page: Path = PAGE) -> None:
    page.write_text(page_of(page.read_text(encoding="utf-8"), list(rows.values())), encoding="utf-8")


def page_of(text: str, rows: Sequence[Row]) -> str:
    """The page with its tables as the rows say."""
    classic = [row for row in rows if not is_modular(row.pipeline)]
    modular = [row for row in rows if is_modular(row.pipeline)]
    text = filled(text, "coverage", _summary(rows))
    text = filled(text, "families", _families(rows))
    text = filled(text, "pipelines", _table(classic))
    return filled(text, "modular pipelines", _table(modular))


def _summary(rows: Sequence[Row]) -> list[str]:
    counts = Counter((row.verdict, is_modular(row.pipeline)) for row in rows)
    kinds = (False, True)
    counted = [[words, *(str(counts[verdict, modular]) for modular in kinds)] for verdict, words in WORDS.items()]
    tried = [row for row in rows if row.batched is not None]
    deviations = [row.merged_deviation for row in tried if row.merged_deviation is not None]
    resumed = [row for row in rows if row.resumable is not None]
    batched, resumable = [row for row in tried if row.batched], [row for row in resumed if row.resumable]
    lines = table(["", "pipelines", "modular pipelines"], counted)
    if tried:
        lines += [
            "",
            f"Of {len(tried)} that were tried with the step engine, {len(batched)} share batches;"
            f" merged forwards are within {max(deviations):.1e} of the largest value."
            f" {len(resumable)} of {len(resumed)} resume in another process.",
        ]
    runs = Counter(row.run for row in rows if row.run)
    return [*lines, "", *(f"* {count} rows: {run}." for run, count in sorted(runs.items()))]


def _families(rows: Sequence[Row]) -> list[str]:
    of_family: dict[str, list[Row]] = {}
    for row in rows:
        if family := family_of(row.pipeline):
            of_family.setdefault(family, []).append(row)
    cells = [
        [family, *(_classes(of_family[family], verdicts) for verdicts in COLUMNS.values())]
        for family in sorted(of_family, key=str.lower)
    ]
    return table(["family", *COLUMNS], cells)


def _classes(rows: Iterable[Row], verdicts: Collection[Verdict]) -> str:
    return ", ".join(f"`{row.pipeline}`" for row in _sorted(rows) if row.verdict in verdicts)


def _table(rows: Iterable[Row]) -> list[str]:
    heads = ["class", "verdict", "tasks", "batched", "resumable", "previews", "fields beyond `prompt`"]
    return table(heads, [_cells(row) for row in _sorted(rows)])


def _cells(row: Row) -> list[str]:
    verdict = f"{WORDS[row.verdict]}: {row.reason}" if row.reason else WORDS[row.verdict]
    marks = [MARKS[each] for each in (row.batched, row.resumable, row.previewed)]
    return [f"`{row.pipeline}`", _in_a_cell(verdict), _tasks(row), *marks, _fields(row.fields)]


def _tasks(row: Row) -> str:
    return ", ".join(task.replace("_", " ") for task in row.tasks) or row.makes


def _fields(names: Sequence[str]) -> str:
    shown = [f"`{name}`" for name in names[:MOST_FIELDS]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.pipeline.lower())
