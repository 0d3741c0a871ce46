"""What a real application says of its models, and waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.served_application import ServedApplication

PATIENCE_S = 600


def states(served: ServedApplication) -> dict[str, str]:
    health = served.health()
    assert health.status_code == 200
    told: dict[str, str] = health.json()["models"]
    return told


def until(happened: Callable[[], bool]) -> float:
    """The seconds that it took."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() < began + PATIENCE_S
        time.sleep(2)
    return time.monotonic() - began
