"""The job store for an event loop: its transactions run in threads of their own, and none is waited for without end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, InvalidRequestError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from deployments.errors import StageUnavailableError
from serve_app.bounded_threads import BoundedThreads, ThreadsClosedError, ThreadsExhaustedError
from serve_app.errors import JobStoreAwayError
from serve_app.jobs.database import JobStoreLostError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 20.0  # for one transaction, with the wait for a thread; longer than SQLite's for another's write
STOPPING_S = 3.0
AWAY = (DBAPIError, PoolTimeoutError, JobStoreLostError, InvalidRequestError)  # the last: connections that end at once


class StoreThreads:
    """`max_threads` transactions at a time; leases have threads of their own, so that nothing keeps them waiting."""

    def __init__(self, name: str = "job-store", max_threads: int = 4) -> None:
        self._threads = BoundedThreads(name, max_threads)

    async def run(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `method` returns. Raises what it raises, JobStoreAwayError where the store does not answer, and
        StageUnavailableError after `close`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._threads.run(method, *args, **kwargs)
        except ThreadsClosedError as error:
            raise StageUnavailableError("this replica is being stopped; try again") from error
        except (TimeoutError, ThreadsExhaustedError) as error:
            raise JobStoreAwayError("the job store does not answer now; try again later") from error
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            raise JobStoreAwayError("the job store is not available now; try again later") from error

    def close(self) -> None:
        """Take nothing more; what was taken is waited for a few seconds."""
        self._threads.close(STOPPING_S)


def is_away(error: SQLAlchemyError) -> bool:
    """Whether the store is to blame, and not what it was told: locked, full, read-only, gone, without its tables."""
    return isinstance(error, AWAY) and not isinstance(error, IntegrityError | DataError)


class Changes:
    """Wakes those who look for jobs to run; others look from time to time."""

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
