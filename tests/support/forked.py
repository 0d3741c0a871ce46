"""Processes that start at once and share nothing: forked from one that has only imported what they need."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

# With torch and diffusers, which are seconds of each start.
PRELOADED = [
    "tests.support.stage_worker",
    "tests.support.resuming_process",
    "tests.support.ranks",
]


def forked_context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
