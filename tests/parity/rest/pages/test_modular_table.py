"""The page of modular pipelines is what their blocks say."""

import pytest

from tests.support.modular_table import DOCS, table
from tests.support.support_table import table_in

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


def test_the_table_of_the_page_is_the_one_that_the_blocks_make() -> None:
    assert table_in(DOCS.read_text(encoding="utf-8"), "modular") == table()
