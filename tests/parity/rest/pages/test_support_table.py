"""Every row of the page of models is true of the tiny model that it speaks of."""

import pytest

from tests.support.support_table import row_of, rows_of_the_page
from tests.support.tiny_models import TINY_MODELS

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_row_says_what_the_tiny_model_does(name: str) -> None:
    assert rows_of_the_page()[name] == row_of(name)
