"""The application that the tests of served behaviour share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.served_application import ServedApplication, serve_run
from tests.support.tiny_models import checkpoint


@pytest.fixture(scope="package")
def flux_checkpoint(checkpoints_root: Path) -> Path:
    return checkpoint("flux", checkpoints_root)


@pytest.fixture(scope="package")
def served(flux_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApplication]:
    """A tiny FLUX in three stages at /; a test that ends a replica waits until all are healthy again."""
    with serve_run(flux_checkpoint, tmp_path_factory.mktemp("served")) as served:
        yield served
