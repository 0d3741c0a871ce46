"""The job store for an event loop: its transactions run in threads of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from deployments.errors import StageUnavailableError

P = ParamSpec("P")
T = TypeVar("T")


class StoreThreads:
    """Not asyncio's own threads: uploads that wait for a dead server must not keep a lease from being renewed."""

    def __init__(self, max_threads: int = 4) -> None:
        self._threads = ThreadPoolExecutor(max_threads, thread_name_prefix="job-store")
        self._is_closed = False

    async def run(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `method` returns. Raises what it raises, and StageUnavailableError after `close`."""
        if self._is_closed:
            raise StageUnavailableError("this replica is being stopped; try again")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(method, *args, **kwargs))

    def close(self) -> None:
        """Take nothing more; what was taken is waited for."""
        self._is_closed = True
        self._threads.shutdown()


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
        async with asyncio.timeout(at_most_s):  # Python 3.11's wait_for would lose a cancel that meets the change
            await change.wait()
    except TimeoutError:
        return
