"""What a stage does about the memory of its device: what a call may take, and another try after it was lacking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeVar

from deployments.errors import DeviceFullError, TooLargeForDeviceError
from deployments.memory.device_memory import DeviceMemory, UncountedMemory
from deployments.tensors.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

NEARLY_ALL = 0.9  # of what a process could ever take: a call that failed with so much would always fail
GB = 1e9
T = TypeVar("T")


class Waiting(Protocol):
    """Weights that wait on the host while they are not used."""

    def rest(self, of_all_threads: bool = False) -> None:
        """Those that are on the device and in no call go back to the host: of this thread, or of all."""
        ...


class NothingWaits:
    """All weights stay on the device."""

    def rest(self, of_all_threads: bool = False) -> None:
        return


@dataclass
class Work:
    """What a thread, or a fiber of the engine's thread, is at."""

    is_short: bool = False
    is_steady: bool = False
    is_tried_again: bool = False
    count_need: Callable[[], int | None] | None = None
    free: int | None = None  # bytes


class StageMemory:
    """The memory of one process's device, for all of its stages; used by any thread and fiber."""

    def __init__(
        self,
        device: DeviceMemory | None = None,
        weight_bytes: int = 0,
        waiting: Waiting | None = None,
        is_steady: bool = False,
    ) -> None:
        """`weight_bytes`: on the device all the time. `is_steady`: all work is, see `run`."""
        self._device = device or UncountedMemory()
        self._weight_bytes = weight_bytes
        self._waiting = waiting or NothingWaits()
        self._is_steady = is_steady
        self._idle: list[Callable[[], None]] = []  # what lets go of what no request uses
        self._work: ContextVar[Work] = ContextVar("work")

    # -- asked by what computes -----------------------------------------------------------------------------

    @property
    def is_short(self) -> bool:
        """Whether this work is done again because memory was lacking."""
        return self._here.is_short

    @property
    def is_steady(self) -> bool:
        """Whether this work must give the same bytes whatever else runs."""
        return self._is_steady or self._here.is_steady

    @property
    def is_tried_again(self) -> bool:
        """Whether this work is done again where it finds too little memory."""
        return self._here.is_tried_again

    def available(self) -> int | None:
        """Bytes that a call may take; None: nobody knows. For steady work what no other work changes."""
        room = self._device.room()
        if room is None:
            return None
        return room.most - self._weight_bytes if self.is_steady else room.free

    def note_need(self, count: Callable[[], int | None]) -> None:
        """`count` gives the least bytes with which the call could do that found too little memory."""
        self._here.count_need = count

    def when_lacking(self, let_go: Callable[[], None]) -> None:
        """From now on `let_go` is called where memory was lacking, in the thread of that work: it takes from the device
        what is kept there for requests to come, and does not wait for long.
        """
        self._idle.append(let_go)

    # -- around the work of a stage ---------------------------------------------------------------------------

    def run(self, work: Callable[[], T], is_steady: bool = False) -> T:
        """What the work returns, which is done once more, by slices and tiles, where memory was lacking.

        Steady work must give the same bytes whatever else runs: it is done again as it was. Raises what the work
        raises; for the lack of memory TooLargeForDeviceError where it can never fit, else DeviceFullError.
        """
        with self._begun(is_steady, is_tried_again=True):
            try:
                return self._tried(work)
            finally:
                self._waiting.rest()

    def _tried(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("memory was lacking, it is tried once more: %s", _first_line(error))
        # Here, and not in the block above, whose error holds the tensors of the work that failed.
        self.free()
        self._here.is_short = not self.is_steady
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            told = _first_line(error)
        raise self.failure(told)

    def named(self, work: Callable[[], T]) -> T:
        """What the work returns. Raises what it raises, with a lack of memory as `run` does, without another try."""
        with self._begun():
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                told = _first_line(error)
            raise self.failure(told)

    @contextmanager
    def steady(self, is_steady: bool) -> Iterator[None]:
        """Around the work of a fiber, whose lack of memory another one names: whether it is steady, see `run`."""
        with self._begun(is_steady):
            yield

    @property
    def _here(self) -> Work:
        return self._work.get(None) or Work()

    @contextmanager
    def _begun(self, is_steady: bool = False, is_tried_again: bool = False) -> Iterator[None]:
        """Inside of work that is done again with less, or that is steady, all is."""
        work = Work(self._here.is_short, is_steady or self._here.is_steady, is_tried_again)
        token = self._work.set(work)
        try:
            yield
        finally:
            self._work.reset(token)

    def rest(self) -> None:
        """Weights that are in no call of any thread go back to the host."""
        self._waiting.rest(of_all_threads=True)

    def give_back(self) -> None:
        """The device gets back what nobody uses, the weights that are in no call too."""
        self._waiting.rest(of_all_threads=True)
        self._device.give_back()

    def free(self) -> None:
        """The same after a failure of this work, and what is kept for later; the least that is free then counts."""
        for let_go in self._idle:
            let_go()
        self.give_back()
        room = self._device.room()
        if room is not None:
            self._here.free = room.free if self._here.free is None else min(self._here.free, room.free)

    def failure(self, told: str) -> Exception:
        """The error for callers; `told` is what the device said."""
        self.free()
        logger.error("memory was lacking: %s", told)
        room, free = self._device.room(), self._here.free
        if room is None or free is None:
            return DeviceFullError("the device has not enough memory for this request now; try again later")
        most = room.most - self._weight_bytes
        needed = self._here.count_need() if self._here.count_need else None
        if needed is not None and needed > most:
            return TooLargeForDeviceError(f"{_needs(f'{needed / GB:.1f} GB', most)}; ask for a smaller one")
        # Others may have had the memory for a moment: only where it was free both times is it never enough.
        if free >= NEARLY_ALL * most:
            return TooLargeForDeviceError(f"{_needs('more memory', most)}; ask for a smaller one")
        return DeviceFullError(
            f"the device has {free / GB:.1f} GB free, too little for this request now; try again later"
        )


def _needs(needed: str, most: int) -> str:
    return f"this size needs {needed} on the device, which has {most / GB:.1f} GB beside the weights"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
