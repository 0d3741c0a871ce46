"""How much work a stage of this replica has done and has before it: what the autoscaling policy reckons with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from deployments.messages import StageName
from deployments.observability.observer import Observer, StageWork

SMOOTHING = 0.2  # weight of the newest request in the seconds of a request


@dataclass(frozen=True)
class Load:
    """A stage of a replica at one moment; `serve_app.autoscaling` reads these names."""

    busy_s: float  # during which at least one request was in work, since the start
    outstanding_s: float  # predicted seconds of work in the requests that are present
    request_s: float  # busy seconds for each request that ended well, by the latest; 0 before the first
    arrived: int  # requests since the start
    present: int  # requests that wait or are in work
    refused: int  # requests since the start that would have come if the ingress had had room for them


class StageLoads(Observer):
    """The load of each stage of a replica."""

    def __init__(self, stages: Iterable[StageName]) -> None:
        self._loads = {stage: StageLoad() for stage in stages}

    def present(self, work: StageWork) -> AbstractContextManager[object]:
        load = self._loads[work.stage]
        if work.stage == "encoder":  # the first that the ingress calls: its load is told of those that were refused
            load.note_refused(work.envelope.refused_before)
        return load.request()

    def around(self, work: StageWork) -> AbstractContextManager[object]:
        return self._loads[work.stage].work()

    def loads(self) -> dict[StageName, Load]:
        """Each stage at this moment."""
        return {stage: load.load() for stage, load in self._loads.items()}


class StageLoad:
    """Counts the requests of one stage as they come, are worked on and end; safe to call from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._arrived = self._present = self._refused = 0
        self._begun_at: list[float] = []  # of the requests that are in work
        self._busy_before_s = self._busy_since = 0.0  # up to the last idle moment; since when it is busy now
        self._charged_s = 0.0  # of the busy seconds: those that the sums below hold
        self._seconds = self._ended = 0.0  # fading sums over the requests that ended well

    @contextmanager
    def request(self) -> Iterator[None]:
        """From the arrival of a request until it has left."""
        with self._lock:
            self._arrived += 1
            self._present += 1
        try:
            yield
        finally:
            with self._lock:
                self._present -= 1

    def note_refused(self, count: int) -> None:
        with self._lock:
            self._refused += count

    @contextmanager
    def work(self) -> Iterator[None]:
        """While a request is in work. What fails counts as work of the next that ends well."""
        with self._lock:
            begun_at = self._clock()
            if not self._begun_at:
                self._busy_since = begun_at
            self._begun_at.append(begun_at)
        ended_well = False
        try:
            yield
            ended_well = True
        finally:
            with self._lock:
                busy_s = self._busy_s(self._clock())
                if ended_well:
                    self._charge(busy_s)
                self._begun_at.remove(begun_at)
                if not self._begun_at:
                    self._busy_before_s = busy_s

    def load(self) -> Load:
        """The outstanding seconds are those of requests that are worked on one after another."""
        with self._lock:
            now = self._clock()
            request_s = self._seconds / self._ended if self._ended else 0.0
            done_s = sum(min(request_s, now - begun_at) for begun_at in self._begun_at)
            outstanding_s = max(0.0, self._present * request_s - done_s)
            return Load(self._busy_s(now), outstanding_s, request_s, self._arrived, self._present, self._refused)

    def _busy_s(self, now: float) -> float:
        return self._busy_before_s + (now - self._busy_since if self._begun_at else 0.0)

    def _charge(self, busy_s: float) -> None:
        # Requests that share the device end in bursts: the mean of sums is right where the mean of ratios is not.
        self._seconds = self._seconds * (1 - SMOOTHING) + busy_s - self._charged_s
        self._ended = self._ended * (1 - SMOOTHING) + 1
        self._charged_s = busy_s
