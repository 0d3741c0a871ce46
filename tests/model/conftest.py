"""The checkpoint that tests of one model share."""

from pathlib import Path

import pytest

from tests.support.tiny_models import checkpoint


@pytest.fixture(scope="session")
def flux_checkpoint(checkpoints_root: Path) -> Path:
    return checkpoint("flux", checkpoints_root)
