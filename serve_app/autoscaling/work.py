"""The work that the deployments of one model have, from what their replicas reported."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

STAGES = ("encoder", "denoiser", "vae")  # in the order in which a request comes to them
WORK_THAT_CAME = ("busy_s", "outstanding_s")  # what was done or is still to be done
REQUESTS_THAT_CAME = ("arrived", "refused")
NEWEST = 1 / 3  # of the look-back period: what is taken for the beginning of more


@dataclass(frozen=True)
class StageWork:
    """What one stage of a deployment has to do, in sum over its replicas."""

    request_s: float  # seconds of work in a request, by the latest; 0 before the first has ended
    arrivals_per_s: float  # requests that came to the replicas, or would have if the ingress had had room for them
    came_s_per_s: float  # seconds of work that came with them, per second
    outstanding_s: float  # predicted seconds of work that is queued or running
    present: float  # requests with that work, those at their callers included


def work_rates(deployments: Sequence[Mapping[str, StageWork]]) -> list[float]:
    """Seconds of work per second that come to each deployment, or will when the stages before it let them through."""
    totals, arrivals_per_s = [0.0] * len(deployments), 0.0
    for stage in STAGES:
        for index, stages in enumerate(deployments):
            if work := stages.get(stage):
                arrivals_per_s = max(arrivals_per_s, work.arrivals_per_s)
                totals[index] += max(work.came_s_per_s, arrivals_per_s * work.request_s)
    return totals


def queued_s(stages: Sequence[StageWork], num_replicas: int) -> float:
    """The outstanding seconds of a deployment's requests, but for one request in work in each replica."""
    present = sum(stage.present for stage in stages)
    queued = max(0.0, present - num_replicas)
    return sum(stage.outstanding_s for stage in stages) * queued / present if queued else 0.0


def stage_work(context: AutoscalingContext) -> dict[str, StageWork]:
    """The work of a deployment by stage; empty if no replica has reported yet."""
    period_s = context.config.look_back_period_s
    reported, newest = Reports(context, period_s), Reports(context, period_s * NEWEST)
    arrived = {stage: reported.last(stage, "arrived") for stage in STAGES if reported.series(stage)}
    work = {}
    for stage in arrived:
        known = [values[-1] for values in reported.values(stage, "request_s") if values[-1] > 0]
        request_s = statistics.median_low(known) if known else 0.0  # the first of a replica takes much longer
        at_callers = (context.total_queued_requests or 0.0) * arrived[stage] / (sum(arrived.values()) or 1.0)
        # A few requests of a short time are mostly chance, so these count less two standard deviations.
        num_newest = sum(newest.rise(stage, number) for number in REQUESTS_THAT_CAME)
        sure = max(0.0, 1 - 2 / math.sqrt(max(1.0, num_newest)))
        work[stage] = StageWork(
            request_s,
            max(reported.rate(stage, *REQUESTS_THAT_CAME), sure * newest.rate(stage, *REQUESTS_THAT_CAME)),
            max(reported.rate(stage, *WORK_THAT_CAME), sure * newest.rate(stage, *WORK_THAT_CAME)),
            reported.last(stage, "outstanding_s") + at_callers * request_s,
            reported.last(stage, "present") + at_callers,
        )
    return work


def most_requests(contexts: Sequence[AutoscalingContext]) -> float:
    """How many requests the deployments had at once in the look-back period, or would have had.

    Those that wait at callers are among them, and those that the ingress had no room for.
    """
    reported = [Reports(context, context.config.look_back_period_s) for context in contexts]
    presents = [
        values[::-1]  # replicas report in step: those as old as each other belong together
        for reports in reported
        for stage in STAGES
        for values in reports.values(stage, "present")
    ]
    ages = range(max(map(len, presents), default=0))
    at_once = max((sum(values[age] for values in presents if age < len(values)) for age in ages), default=0.0)
    refused = sum(reports.rise(stage, "refused") for reports in reported for stage in STAGES)
    return at_once + refused + sum(context.total_queued_requests or 0.0 for context in contexts)


def long_at_work(context: AutoscalingContext, target_queue_s: float) -> int:
    """Replicas with more work than should wait: no queue shows it, but taking one away would make one."""
    outstanding_s: dict[Any, float] = {}
    for stage in STAGES:
        for replica, series in (context.raw_metrics or {}).get(f"{stage}_outstanding_s", {}).items():
            outstanding_s[replica] = outstanding_s.get(replica, 0.0) + (series[-1].value if series else 0.0)
    return sum(seconds > target_queue_s for seconds in outstanding_s.values())


class Reports:
    """The numbers that the replicas of a deployment reported in its last `period_s`, each a series over time."""

    def __init__(self, context: AutoscalingContext, period_s: float) -> None:
        self._raw, self._period_s = context.raw_metrics or {}, period_s
        self._trimmed: dict[str, list[list[Any]]] = {}
        spans = [each[-1].timestamp - each[0].timestamp for stage in STAGES for each in self.series(stage)]
        # A replica that has just started cannot know how much comes in a second.
        self._seconds: float = max([period_s / 2, *spans])

    def series(self, stage: str, number: str = "arrived") -> list[list[Any]]:
        """By replica, each with its time stamps."""
        name = f"{stage}_{number}"
        if name not in self._trimmed:
            self._trimmed[name] = [
                [each for each in series if each.timestamp >= series[-1].timestamp - self._period_s - 1e-3]
                for series in self._raw.get(name, {}).values()
                if series
            ]
        return self._trimmed[name]

    def values(self, stage: str, number: str) -> list[list[float]]:
        return [[each.value for each in series] for series in self.series(stage, number)]

    def last(self, stage: str, number: str) -> float:
        """The sum of the replicas' last values."""
        return sum(values[-1] for values in self.values(stage, number))

    def rise(self, stage: str, number: str) -> float:
        """By how much it rose, in sum over the replicas."""
        return sum(values[-1] - values[0] for values in self.values(stage, number))

    def rate(self, stage: str, *numbers: str) -> float:
        """By how much the sum of the numbers rose per second."""
        return max(0.0, sum(self.rise(stage, number) for number in numbers)) / self._seconds


def load_s(context: AutoscalingContext, before: float) -> float:
    """How long the start of a replica takes, by the slowest of those that report; else as it was `before`."""
    told = [series[-1].value for series in (context.raw_metrics or {}).get("load_s", {}).values() if series]
    return max(told, default=before)
