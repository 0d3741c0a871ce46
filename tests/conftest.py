"""What every test shares: reproducible arithmetic, no network, tiny checkpoints built once a run."""

import os

# Before torch is imported anywhere: without it equal weights at different addresses give different bits.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # the default writes a token into the home folder

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests.support.tiny_models.checkpoint builds its folders."""
    return tmp_path_factory.mktemp("checkpoints")
