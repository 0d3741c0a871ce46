"""Twenty random requests to each operation."""

from pathlib import Path

import pytest

from tests.support.documented_answers import MODELS, check_answers


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", MODELS)
def test_no_request_finds_an_answer_that_is_not_documented(kind: str, tmp_path: Path) -> None:
    assert check_answers(kind, tmp_path, max_examples=20) >= 1000
