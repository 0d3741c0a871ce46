"""What every test shares: reproducible arithmetic, no network, tiny checkpoints built once a run; seconds by tier."""

import gc
import logging
import os

from tests.support.forking.environment import environment_of_tests

os.environ.update(environment_of_tests(os.environ))  # before torch is imported anywhere

from collections import defaultdict
from pathlib import Path

import hypothesis
import pytest

from tests.side_by_side import CHECKPOINTS

gc.disable()  # until the tests are collected, see below

# What a change breaks shows in every run of CI, and chance finds new cases elsewhere. A busy machine is no failure.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.register_profile("local", deadline=None, max_examples=30)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector would go through it again and again, a sixth of the time."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)  # trees of syntax and of modules that tests make are mostly no garbage either
    gc.enable()


@pytest.fixture(scope="session")
def checkpoints_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests.support.tiny_models.checkpoint builds its folders; runs side by side share one."""
    shared = os.environ.get(CHECKPOINTS)
    return Path(shared) if shared else tmp_path_factory.mktemp("checkpoints")


OURS = ("deployments", "env_config", "serve_app")  # what the names of our loggers begin with


@pytest.fixture(autouse=True)
def loggers_are_fresh() -> None:
    """A replica that an earlier test made in this process gives its level to our loggers, and to pytest's handlers."""
    for handler in logging.root.handlers:
        handler.setLevel(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith(OURS) and isinstance(logger, logging.Logger):
            logger.handlers, logger.propagate = [], True
            if logger.level != logging.NOTSET:  # setLevel goes through all loggers of all libraries
                logger.setLevel(logging.NOTSET)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each tier (a folder of tests): how many tests, and their seconds with those of their fixtures."""
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[str, set[str]] = defaultdict(set)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tier = report.nodeid.removeprefix("tests/").partition("/")[0]
                seconds[tier] += report.duration
                tests[tier].add(report.nodeid)
    for tier, spent in seconds.items():
        terminalreporter.write_line(f"{tier}: {len(tests[tier])} tests, {spent:.0f} s")
