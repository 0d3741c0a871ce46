"""The tables of models in the pages are those that the tests' own data make."""

import pytest

from benchmarks.report import table_in
from tests.support.engine_parity import NEVER_MERGED
from tests.support.preview_parity import NO_PREVIEWS
from tests.support.support_table import README, row_of, rows_of_the_page, tasks_table
from tests.support.tiny_models import TINY_MODELS

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")

# One for each answer: all of it, a UNet, a given picture, no batch, no preview, sound.
BUILT = ("flux", "sd15_inpaint", "wan21_i2v", "klein_kv", "pixart_alpha", "stable_audio")


def test_the_page_has_a_row_for_every_tiny_model() -> None:
    rows = rows_of_the_page()
    assert set(rows) == set(TINY_MODELS)
    assert {name for name, row in rows.items() if not row.is_merged} == set(NEVER_MERGED)
    assert {name for name, row in rows.items() if not row.is_previewed} == set(NO_PREVIEWS)


@pytest.mark.rest
def test_a_row_says_what_the_tiny_model_does() -> None:
    rows = rows_of_the_page()
    assert [rows[name] for name in BUILT] == [row_of(name) for name in BUILT]


def test_the_readme_counts_the_rows_of_the_page() -> None:
    assert table_in(README.read_text(encoding="utf-8"), "tasks") == tasks_table(list(rows_of_the_page().values()))
