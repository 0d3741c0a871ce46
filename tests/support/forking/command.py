"""What stands in the place of `python` where a program starts as a fork, and the environment that it needs."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.forking.client import FOLDER, ONE_FOR_ALL_NODES, OWNER

FORKED_PYTHON = (sys.executable, "-I", "-S", str(Path(__file__).with_name("client.py")))


def forks_in(folder: str | Path) -> dict[str, str]:
    """The servers listen in that folder, whose path is short; outside of Ray they end with this process."""
    return {FOLDER: str(folder), OWNER: str(os.getpid())}


def forks_of_all_nodes_in(folder: str | Path) -> dict[str, str]:
    """The same for one Ray whose nodes are on this machine: a node that comes finds the libraries imported."""
    return forks_in(folder) | {ONE_FOR_ALL_NODES: "1"}


def python_with_libraries() -> tuple[str, ...]:
    """For a program that imports torch, diffusers or Ray anyway: forked in a run of several folders, else a new one."""
    return FORKED_PYTHON if FOLDER in os.environ else (sys.executable,)


@contextmanager
def forks_of_this_process() -> Iterator[dict[str, str]]:
    """The same with a folder of its own; empty where a process around this one has a server already."""
    if FOLDER in os.environ:
        yield {}
        return
    folder = tempfile.mkdtemp(prefix="forks-", dir="/tmp")
    try:
        yield forks_in(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
