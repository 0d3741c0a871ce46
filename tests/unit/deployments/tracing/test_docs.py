"""docs/tracing.md has the table of spans as it is."""

from pathlib import Path

from deployments.tracing.table import EVERYWHERE, EVERYWHERE_STANDARD, PREFIX, SPANS, SpanRow

DOCS = Path(__file__).resolve().parents[4] / "docs" / "tracing.md"
HEAD = ["| span | parent | what it times | attributes and events |", "|---|---|---|---|"]


def test_the_docs_have_every_span_with_its_attributes_and_events() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    begin = lines.index(HEAD[0])
    assert lines[begin : begin + len(table())] == table()


def test_the_docs_have_the_attributes_of_every_span() -> None:
    docs = DOCS.read_text(encoding="utf-8")
    for name, what in ({PREFIX + each: what for each, what in EVERYWHERE.items()} | EVERYWHERE_STANDARD).items():
        assert f"`{name}`: {what}" in docs


def table() -> list[str]:
    return [*HEAD, *(row_of(name, row) for name, row in SPANS.items())]


def row_of(name: str, row: SpanRow) -> str:
    said = "; ".join(
        f"`{each}` {what}".strip() for each, what in (dict.fromkeys(row.standard, "") | row.attributes).items()
    )
    events = f". Events: {', '.join(row.events)}" if row.events else ""
    shown = "`POST /v1/images/generations` ..." if name == "request" else f"`{name}`"
    return f"| {shown}, {row.kind.lower()} | {row.parent} | {row.what} | {said}{events} |"
