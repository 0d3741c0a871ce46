"""The job store for an event loop: its transactions run in threads of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StoreThreads:
    """Not asyncio's own threads: uploads that wait for a dead server must not keep a lease from being renewed."""

    def __init__(self, max_threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(max_threads, thread_name_prefix="job-store")

    async def run(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(method, *args, **kwargs))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Changes:
    """Wakes those who wait for something to happen to a job of this process; others look from time to time."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def notify(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    def next(self) -> asyncio.Event:
        """Set at the next change; take it before looking, so that none is missed in between."""
        return self._next


async def wait_for_change(change: asyncio.Event, at_most_s: float) -> None:
    try:
        await asyncio.wait_for(change.wait(), at_most_s)
    except TimeoutError:
        return
