"""Marks in the order of the device's work: seen from the host, without waiting for all that the device has to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)


class Mark(Protocol):
    """Reached when the device has done what was queued before it."""

    def is_reached(self) -> bool:
        """Does not wait."""
        ...

    def wait(self) -> None:
        """Raises what the device raises."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Of the device, from the mark `earlier` to this one; both are reached."""
        ...


MakeMark = Callable[[], Mark]


class HostMark:
    """For work that is done when its call returns."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._at = clock()

    def is_reached(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: HostMark) -> float:
        return self._at - earlier._at


class EventMark:
    """An event in the current stream of the thread that makes it."""

    def __init__(self, event_class: Any) -> None:
        self._event = event_class(enable_timing=True)
        self._event.record()

    def is_reached(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: EventMark) -> float:
        return float(earlier._event.elapsed_time(self._event)) / 1000


def marks_of(device: torch.device) -> MakeMark:
    """Makes marks of that device."""
    if device.type == "cpu":
        return HostMark
    module = torch.get_device_module(device)
    event_class = getattr(module, "Event", None)
    if event_class is not None:
        return lambda: EventMark(event_class)
    logger.warning("%s has no events: the host waits for it after every forward", device.type)

    def synchronized() -> HostMark:
        module.synchronize()
        return HostMark()

    return synchronized
