"""Bounds every call to a storage in time, and spares callers the calls that would not be answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from deployments.errors import StorageError
from deployments.metrics.meter import NO_METER, Meter
from serve_app.errors import ObjectNotFoundError, StorageAwayError
from serve_app.storage.base import StorageBackend, StoredObject

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # without a try, after a call that was not answered


@dataclass(frozen=True)
class Patience:
    """How long a call may take in all: `seconds`, and more for an object of many bytes."""

    seconds: float
    bytes_per_s: float
    max_calls: int  # at a time

    def for_bytes(self, num_bytes: int) -> float:
        return self.seconds + num_bytes / self.bytes_per_s


OF_CALLERS = Patience(5.0, 8e6, max_calls=16)  # somebody waits
OF_UPLOADS = Patience(30.0, 256e3, max_calls=1)  # nobody waits; also a slow line is to bring a large file through
LOADING_S = 45.0  # an object whose size is not known before


class Breaker:
    """Closed while the storage answers. Open after a call without an answer: until its pause is over there is no
    other, then one of those that may try is let through, and its outcome decides. The pauses grow."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._pause_s = 0.0  # 0: closed
        self._open_until = 0.0
        self._is_on_trial = False

    @property
    def is_open(self) -> bool:
        return self._pause_s > 0

    @contextmanager
    def call(self, may_try: bool) -> Iterator[None]:
        """Around a call; raises StorageAwayError instead of one that must not be made."""
        is_trial = self.is_open
        if is_trial and (not may_try or self._is_on_trial or self._monotonic() < self._open_until):
            raise StorageAwayError("the storage did not answer before; it is tried again later")
        self._is_on_trial = self._is_on_trial or is_trial
        try:
            yield
        except StorageAwayError:
            self._open(is_trial)
            raise
        except (StorageError, ObjectNotFoundError):  # an answer, if no good one
            self._close()
            raise
        else:
            self._close()
        finally:
            if is_trial:
                self._is_on_trial = False

    def _open(self, is_trial: bool) -> None:
        if self._pause_s and not is_trial:
            return  # it began before the breaker opened
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s or FIRST_PAUSE_S)
        self._open_until = self._monotonic() + self._pause_s

    def _close(self) -> None:
        self._pause_s = 0.0


class GuardedStorage:
    """`backend` with a bounded time for each call; raises StorageAwayError, and no error that is not a storage's."""

    def __init__(
        self,
        backend: StorageBackend,
        patience: Patience = OF_CALLERS,
        breaker: Breaker | None = None,
        may_try: bool = True,
        meter: Meter = NO_METER,
        way: str = "direct",
    ) -> None:
        """`may_try`: its calls may find out whether the storage is back; else others do. `way`: to the storage."""
        self.backend = backend
        self.may_try = may_try
        self.is_shared = backend.is_shared
        self.patience = patience
        self.meter = meter
        self.way = way
        self._breaker = breaker or Breaker()
        self._writes = asyncio.Semaphore(patience.max_calls)
        self._reads = asyncio.Semaphore(patience.max_calls)

    async def check(self) -> None:
        await self._bounded("check", self._writes, self.backend.check, OF_UPLOADS.seconds)

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        at_most_s = self.patience.for_bytes(len(data))
        store = partial(self.backend.store, key, data, content_type, metadata)
        stored = await self._bounded("store", self._writes, store, at_most_s)
        self.meter.count("triptych_stored_bytes_total", len(data), way=self.way)
        return stored

    def url_of(self, key: str) -> str:
        return self.backend.url_of(key)

    async def load(self, key: str) -> tuple[bytes, str]:
        return await self._bounded("load", self._reads, partial(self.backend.load, key), LOADING_S)

    async def delete(self, key: str) -> None:
        await self._bounded("delete", self._writes, partial(self.backend.delete, key), self.patience.seconds)

    def tell(self) -> None:
        """Whether the storage answers, to the meter."""
        self.meter.set("triptych_storage_circuit_open", float(self._breaker.is_open))

    async def _bounded(
        self, operation: str, slots: asyncio.Semaphore, call: Callable[[], Awaitable[T]], at_most_s: float
    ) -> T:
        async with slots:
            with self._breaker.call(self.may_try), self._measured(operation):
                return await _answered(call, at_most_s)

    @contextmanager
    def _measured(self, operation: str) -> Iterator[None]:
        began, outcome = time.perf_counter(), "ok"
        try:
            yield
        except StorageAwayError:
            outcome = "away"
            raise
        except ObjectNotFoundError:
            outcome = "missing"
            raise
        except StorageError:
            outcome = "error"
            raise
        finally:
            seconds = time.perf_counter() - began
            self.meter.observe("triptych_storage_seconds", seconds, operation=operation, outcome=outcome)


async def _answered(call: Callable[[], Awaitable[T]], at_most_s: float) -> T:
    try:
        async with asyncio.timeout(at_most_s):
            return await call()
    except TimeoutError as error:
        raise StorageAwayError(f"the storage did not answer within {at_most_s:g} s") from error
    except (StorageError, ObjectNotFoundError):
        raise
    except Exception as error:
        logger.exception("the storage failed in a way that is not known")
        raise StorageAwayError(f"the storage failed: {type(error).__name__}") from error
