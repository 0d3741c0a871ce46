"""How much of the host's memory the Run:ai streamer reads ahead into, while weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "RUNAI_STREAMER_MEMORY_LIMIT"  # the streamer's own; bytes


@contextmanager
def streamer_memory(num_bytes: int) -> Iterator[None]:
    """The streamer's own default is 40 GB, a whole model: it is given `num_bytes` unless the variable is set."""
    if VARIABLE in os.environ:
        yield
        return
    os.environ[VARIABLE] = str(num_bytes)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def streamer_limit() -> str:
    """As the variable is set; empty where it is not."""
    return os.environ.get(VARIABLE, "")
