"""What was found: of a configuration, of a pipeline class as its row, and the file of rows that the page is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

ROWS = Path("docs/benchmarks/coverage.jsonl")

Verdict = Literal["wrong", "failed", "refused", "hand_off", "remote_calls", "not_judged"]
PASSED: frozenset[Verdict] = frozenset({"hand_off", "remote_calls"})
BY_WEIGHT: tuple[Verdict, ...] = ("wrong", "failed", "remote_calls", "hand_off", "refused")  # which decides for a class
MAX_REASON = 400  # characters


@dataclass(frozen=True)
class EngineFound:
    """None where it was not tried: a request of one step has no checkpoint."""

    problems: tuple[str, ...] = ()
    batched: bool | None = None
    merged_deviation: float | None = None
    resumable: bool | None = None
    previewed: bool | None = None
    trace: str = ""  # of the error, for whoever mends it


NOT_TRIED = EngineFound()


@dataclass(frozen=True)
class Found:
    """What one configuration showed."""

    verdict: Verdict
    reason: str = ""
    trace: str = ""  # of the error, for whoever mends it
    makes: str = ""
    tasks: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    engine: EngineFound = NOT_TRIED


@dataclass(frozen=True)
class Row:
    """One pipeline class. None where it was not tried."""

    pipeline: str
    verdict: Verdict
    reason: str = ""  # why it is refused, failed, wrong or not judged; or what else there is to say
    makes: str = ""
    tasks: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()  # of a request beyond `prompt`, as HTTP takes them
    configurations: int = 0  # of the tests, that were judged
    batched: bool | None = None
    merged_deviation: float | None = None  # of merged forwards from lone ones, relative to the largest value
    resumable: bool | None = None
    previewed: bool | None = None
    run: str = ""  # when, and with what


def row_of(pipeline: str, found: Sequence[Found]) -> Row:
    """The class's row: its worst configuration decides, but a refusal of one does not hide that others pass."""
    judged = [each for each in found if each.verdict != "not_judged"]
    if not judged:
        return Row(pipeline, "not_judged", found[0].reason)
    worst = min(judged, key=lambda each: BY_WEIGHT.index(each.verdict))
    others = [each for each in judged if each.verdict != worst.verdict]
    told = worst if worst.verdict in ("wrong", "failed") else next(filter(_is_refused, judged), worst)
    reason = told.reason
    if reason and others:
        same = [each for each in judged if each.verdict == told.verdict]
        reason = f"{len(same)} of {len(judged)} configurations, {told.verdict}: {reason}"
    described = next((each for each in judged if each.makes), worst)
    engines = [each.engine for each in judged]
    deviations = [each.merged_deviation for each in engines if each.merged_deviation is not None]
    return Row(
        pipeline,
        worst.verdict,
        reason[:MAX_REASON],
        described.makes,
        described.tasks,
        described.fields,
        len(judged),
        _all([each.batched for each in engines]),
        max(deviations, default=None),
        _all([each.resumable for each in engines]),
        _all([each.previewed for each in engines]),
    )


def is_missing(row: Row | None, with_engine: bool) -> bool:
    """Whether the class is to be tried: no row judges it, or the engine was not tried of one that passed."""
    if row is None or row.verdict == "not_judged":
        return True
    return with_engine and row.verdict in PASSED and row.batched is None


def newest(known: Row | None, found: Row) -> Row:
    """What is kept of a class: it stays judged where a later run could not judge it, for want of time or parts."""
    is_lost = found.verdict == "not_judged" and known is not None and known.verdict != "not_judged"
    return known if known is not None and is_lost else found


def read_rows(file: Path = ROWS) -> dict[str, Row]:
    """The rows by the name of the class; none where there is no file."""
    if not file.exists():
        return {}
    rows = (_row(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines())
    return {row.pipeline: row for row in rows}


def write_rows(rows: Iterable[Row], file: Path = ROWS) -> None:
    """One line for each class, by name; what is not known is left out."""
    lines = [json.dumps(_known(row)) for row in sorted(rows, key=lambda row: row.pipeline)]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _row(found: dict[str, Any]) -> Row:
    return Row(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def _known(row: Row) -> dict[str, Any]:
    defaults = {each.name: each.default for each in fields(Row)}
    return {name: value for name, value in asdict(row).items() if value != defaults[name]}


def _all(values: Sequence[bool | None]) -> bool | None:
    known = [value for value in values if value is not None]
    return all(known) if known else None


def _is_refused(found: Found) -> bool:
    return found.verdict == "refused"
