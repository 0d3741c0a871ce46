"""Every error sentence of the source stands in docs/error_sentences.md."""

import ast

from benchmarks.report import table_in
from tests.support.error_sentences import PAGE, sentence_of, tables


def test_the_page_has_the_sentences_of_the_source() -> None:
    """After `python -m tests.support.error_sentences`."""
    page = PAGE.read_text(encoding="utf-8")
    assert {place: table_in(page, place) for place in tables()} == tables()


def test_a_sentence_has_gaps_for_its_values() -> None:
    said = {
        'f"size: must be above 0, got {size!r}"': "size: must be above 0, got …",
        '"a " + what + " is missing"': "a … is missing",
        "NAMED": "this one has a name",
        '"invalid_value"': None,
        "message": None,
    }
    found = {code: sentence_of(ast.parse(code, mode="eval").body, {"NAMED": "this one has a name"}) for code in said}
    assert found == said
