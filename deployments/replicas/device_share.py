"""A replica's share of its device: refused at the start where it is none or too much, kept, given back while idle."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from deployments.accelerators import VARIABLE, assigned_share, share_problem
from deployments.device_memory import give_back_memory, limit_memory
from deployments.devices import Device, DeviceError

logger = logging.getLogger(__name__)

IDLE_S = 1.0  # as long as this nothing is in work; the next work takes its memory anew, which costs milliseconds


def claim_share(device: Device, assigned: Mapping[str, float], fence: bool) -> float | None:
    """The share of the device that Ray `assigned` to this replica; None where Ray does not count such devices.

    With `fence` tensors take no more of the device's memory. Raises DeviceError, which names the field.
    """
    share = assigned_share(device.name, assigned)
    if share is None:
        if fence:
            raise DeviceError(f"fence_device_memory is true: with {VARIABLE}={device.name} it must be false")
        return None
    problem = share_problem(device.name, share)
    if problem is not None:
        raise DeviceError(problem)
    if fence and share < 1:
        limit_memory(device, share)
    return share


class IdleMemory:
    """Gives back what an idle process keeps of a device that it shares, once after its last work."""

    def __init__(self, device: Device, share: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._device = device
        self._is_shared = share is not None and share < 1
        self._clock = clock
        self._given_back_for: float | None = None  # the idle time for which it was done

    def is_due(self, idle_since: float | None) -> bool:
        """`idle_since`: when the last work ended, by the clock; None during one. True once for each idle time."""
        if not self._is_shared or idle_since is None or idle_since == self._given_back_for:
            return False
        if self._clock() - idle_since < IDLE_S:
            return False
        self._given_back_for = idle_since
        return True

    def give_back(self) -> None:
        """In any thread. A device that cannot do it shows that at its next work."""
        try:
            give_back_memory(self._device)
        except RuntimeError as error:
            logger.warning("unused memory of %s was not given back: %s", self._device.name, error)
