"""The requests that a replica has at this moment, for /dev/replicas."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deployments.messages import StageName
from deployments.observability.observer import Observer, StageWork


class PresentRequests(Observer):
    """Safe to call from any thread; one request may be in several stages of a replica."""

    def __init__(self) -> None:
        self._present: dict[tuple[str, StageName], tuple[float, str]] = {}  # -> (time.time() of arrival, state)

    @contextmanager
    def present(self, work: StageWork) -> Iterator[None]:
        key = work.request.request_id, work.stage
        waiting = (work.arrived, "waiting")
        self._present[key] = waiting
        try:
            yield
        finally:
            if self._present.get(key) is waiting:  # it was cancelled before its turn
                del self._present[key]

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        key = work.request.request_id, work.stage
        self._present[key] = (work.arrived, "running")
        try:
            yield
        finally:
            self._present.pop(key, None)

    def describe(self) -> dict[str, Any]:
        now = time.time()
        requests = [
            {"request_id": request_id, "stage": stage, "state": state, "since_s": now - arrived}
            for (request_id, stage), (arrived, state) in sorted(self._present.copy().items())
        ]
        return {"requests": requests}
