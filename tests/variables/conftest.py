"""The checkpoints and the replica that the proofs of the variables share."""

from pathlib import Path

import pytest

from tests.support.tiny_models import checkpoint
from tests.support.whole_replica import make_replica

__all__ = ["make_replica"]


@pytest.fixture(scope="session")
def flux_checkpoint(checkpoints_root: Path) -> Path:
    return checkpoint("flux", checkpoints_root)


@pytest.fixture(scope="session")
def wan22_checkpoint(checkpoints_root: Path) -> Path:
    return checkpoint("wan22", checkpoints_root)
