"""What every test shares: reproducible arithmetic, no network, tiny checkpoints built once a run."""

import os

# Before torch is imported anywhere: without it equal weights at different addresses give different bits.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # the default writes a token into the home folder

from pathlib import Path

import pytest

RAY_FILES = {"test_kill.py", "test_launch.py", "test_served.py"}  # these start a Ray of their own


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the tests, file by file; all tests on Ray are one share, so one cluster runs at a time."""
    for item in items:
        on_ray = item.path.name in RAY_FILES or "served" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if on_ray else item.path.name))


@pytest.fixture(scope="session")
def checkpoints_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests.tiny_models.checkpoint builds its folders."""
    return tmp_path_factory.mktemp("checkpoints")
