"""Threads for calls that may hang: so many run at a time, and a caller that gives up leaves its thread behind."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ThreadsExhaustedError(Exception):
    """As many calls as may be left behind have not ended: another would not end either."""


class ThreadsClosedError(Exception):
    """No call is taken after `close`."""


class BoundedThreads:
    """Runs blocking calls for an event loop, `max_running` at a time.

    Not asyncio's own threads: a call that hangs there delays everything else of the process, and even its end. A
    call whose caller gave up goes on in its thread, which counts no longer; `max_left` bounds how many there may be.
    """

    def __init__(self, name: str, max_running: int, max_left: int = 32) -> None:
        self.name = name
        self.max_left = max_left
        self._slots = asyncio.Semaphore(max_running)
        self._running: set[threading.Thread] = set()
        self._left: list[threading.Thread] = []  # their callers have given up
        self._is_closed = False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns. Raises what it raises, ThreadsExhaustedError and ThreadsClosedError."""
        async with self._slots:
            if self._is_closed:
                raise ThreadsClosedError(self.name)
            self._left = [thread for thread in self._left if thread.is_alive()]
            if len(self._left) >= self.max_left:
                raise ThreadsExhaustedError(f"{self.max_left} calls of {self.name} did not end")
            outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
            call = partial(contextvars.copy_context().run, function, *args, **kwargs)
            thread = threading.Thread(target=_work, args=(call, outcome), name=self.name, daemon=True)
            self._running.add(thread)
            thread.start()
            try:
                return await outcome
            finally:
                self._running.remove(thread)
                if outcome.cancelled():
                    self._left.append(thread)

    def close(self, wait_s: float) -> None:
        """Take nothing more; what runs is waited for, but no longer than `wait_s`. From any thread."""
        self._is_closed = True
        give_up_at = time.monotonic() + wait_s
        for thread in (*self._running, *self._left):
            thread.join(max(0.0, give_up_at - time.monotonic()))


def _work(call: Callable[[], Any], outcome: asyncio.Future[Any]) -> None:
    result: Any = None
    error: BaseException | None = None
    try:
        result = call()
    except BaseException as raised:  # noqa: BLE001  (it is raised where the call was made)
        error = raised
    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
        outcome.get_loop().call_soon_threadsafe(_settle, outcome, result, error)


def _settle(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if outcome.done():
        return
    if error is None:
        outcome.set_result(result)
    elif isinstance(error, StopIteration):  # no future takes it
        outcome.set_exception(RuntimeError(f"{error!r}"))
    else:
        outcome.set_exception(error)
