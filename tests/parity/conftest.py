"""The processes that all models go through, one after the other."""

from collections.abc import Iterator

import pytest

from tests.support.resuming_process import ResumingProcess
from tests.support.stage_processes import StageProcesses


@pytest.fixture(scope="session")
def stages() -> Iterator[StageProcesses]:
    processes = StageProcesses()
    yield processes
    processes.stop()


@pytest.fixture(scope="session")
def other_process() -> Iterator[ResumingProcess]:
    process = ResumingProcess()
    yield process
    process.stop()
