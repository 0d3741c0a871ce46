"""Previews of all other models."""

from pathlib import Path

import pytest

from tests.support.parity_models import NOT_PREVIEWED
from tests.support.preview_parity import check_previews

# Pipelines use what diffusers and torch have deprecated.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", NOT_PREVIEWED)
def test_previews_decode_and_change_nothing(name: str, checkpoints_root: Path) -> None:
    check_previews(name, checkpoints_root)
