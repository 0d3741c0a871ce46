"""The documentation table: complete, and fresh in docs/."""

from pathlib import Path

import pytest

from env_config.told.reference import BEGIN, END, reference, write_reference
from tests.support import proofs
from tests.support.documented import DOCUMENT, DOCUMENTED, DocumentedVariable

DOCS_PAGE = Path(__file__).parents[3] / "docs" / "environment_variables.md"


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda row: row.name.lower())
def test_a_variable_has_a_row_with_the_documents_words_and_an_effect(documented: DocumentedVariable) -> None:
    (row,) = (line for line in reference().splitlines() if line.startswith(f"| `{documented.name}` |"))
    _, default, description, effect = (cell.strip() for cell in row.strip("|").split("|"))
    assert default.strip("`") == documented.default
    assert description == documented.description
    assert len(effect) > 20


def test_the_headings_are_the_documents() -> None:
    def headings(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("##")]

    def leaf_titles(lines: list[str]) -> list[str]:
        return [line.lstrip("# ") for line in lines]

    titles = leaf_titles(headings(DOCUMENT.read_text(encoding="utf-8")))
    assert leaf_titles(headings(reference())) == titles


def test_the_page_in_docs_is_fresh(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_bytes(DOCS_PAGE.read_bytes())
    write_reference(copy)
    proofs.write_table(copy)
    assert DOCS_PAGE.read_text(encoding="utf-8") == copy.read_text(encoding="utf-8"), (
        "run `python -m env_config --write-reference docs/environment_variables.md` and "
        "`python -m tests.support.proofs docs/environment_variables.md`"
    )


def test_only_the_part_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_reference(page)
    assert page.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\n{reference()}\n{END}\nafter\n"


def test_a_page_without_markers_is_refused_and_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="must contain the lines"):
        write_reference(page)
    assert page.read_text(encoding="utf-8") == "nothing"
