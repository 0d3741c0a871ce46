"""The requests that a replica has at this moment and their steps, for the page and /dev/replicas."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from deployments.messages import StageName
from deployments.observability.observer import Observer, StageWork


@dataclass
class Present:
    """A request in one stage of the replica."""

    arrived: float  # time.time()
    num_steps: int | None  # that it makes, where that is known
    state: Literal["waiting", "running"] = "waiting"
    steps: int = 0  # that were made here

    def step(self) -> None:
        self.steps += 1


class PresentRequests(Observer):
    """Safe to call from any thread; one request may be in several stages of a replica."""

    def __init__(self) -> None:
        self._present: dict[tuple[str, StageName], Present] = {}

    @contextmanager
    def present(self, work: StageWork) -> Iterator[None]:
        key = work.request.request_id, work.stage
        waiting = Present(work.arrived, _num_steps(work))
        self._present[key] = waiting
        try:
            yield
        finally:
            if self._present.get(key) is waiting:  # it was cancelled before its turn
                del self._present[key]

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        key = work.request.request_id, work.stage
        running = Present(work.arrived, _num_steps(work), "running")
        work.on_step.append(running.step)
        self._present[key] = running
        try:
            yield
        finally:
            self._present.pop(key, None)

    def describe(self) -> dict[str, Any]:
        now = time.time()
        requests = [
            {
                "request_id": request_id,
                "stage": stage,
                "state": each.state,
                "since_s": now - each.arrived,
                "steps": each.steps,
                "num_steps": each.num_steps,
            }
            for (request_id, stage), each in sorted(self._present.copy().items(), key=lambda item: item[0])
        ]
        return {"requests": requests}


def _num_steps(work: StageWork) -> int | None:
    """Of the scheduler; None for a stage that makes none, and where nobody has counted them."""
    asked = work.request.num_steps or work.request.arguments.get("num_inference_steps")
    return asked if work.stage == "denoiser" and isinstance(asked, int) else None
