"""The policy that a Serve config file may name: the replicas of all stages together, by the work that each has.

    autoscaling_policy:
      policy_function: serve_app.autoscaling:ReplicaRatio
      policy_kwargs: {target_queue_s: 15}

Serve's own policy looks at each deployment alone and counts requests. This one reckons in seconds of work, as the
replicas report them (`StageReplica.record_autoscaling_stats`), and when more requests come to one stage it also
gives the stages behind it what these requests will need there. See docs/autoscaling.md.

Serve sends this file by value to its controller, which may not have the project: it imports only what Ray brings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import cloudpickle
from ray.serve.config import AutoscalingContext

from serve_app import scale_to_zero

cloudpickle.register_pickle_by_value(scale_to_zero)  # it goes where this file goes

STAGES = ("encoder", "denoiser", "vae")  # in the order in which a request comes to them
WORK_THAT_CAME = ("busy_s", "outstanding_s")  # what was done or is still to be done
REQUESTS_THAT_CAME = ("arrived", "refused")
NEWEST = 1 / 3  # of the look-back period: what is taken for the beginning of more
PEAKS = "peaks"  # in the state that Serve keeps for each deployment

Peaks = tuple[tuple[float, int], ...]  # (time in seconds, replicas needed then): times rise, replicas fall


@dataclass(frozen=True)
class StageWork:
    """What one stage of a deployment has to do, in sum over its replicas."""

    request_s: float  # seconds of work in a request, by the latest; 0 before the first has ended
    arrivals_per_s: float  # requests that came to the replicas, or would have if the ingress had had room for them
    came_s_per_s: float  # seconds of work that came with them, per second
    outstanding_s: float  # predicted seconds of work that is queued or running
    present: float  # requests with that work, those at their callers included


class ReplicaRatio:
    """Called by Serve's controller ten times a second, for the deployments that have an `autoscaling_config`.

    A deployment gets the replicas that do the work which comes in at `target_utilisation`, or those which besides
    do what is queued within `target_queue_s`, whichever is more; and no more than there were requests at once.
    More replicas start at once. One goes when it was not needed for `cooldown_s`. With `max_replicas_in_all` the
    deployments share so many, in proportion to what they need where that is more.

    The decision depends on the arguments only: what must be remembered is in the state that Serve hands back.
    """

    def __init__(
        self,
        target_utilisation: float = 0.8,
        target_queue_s: float = 15.0,
        cooldown_s: float = 180.0,
        max_replicas_in_all: int | None = None,
        idle_s: scale_to_zero.IdleS = scale_to_zero.DEFAULT_IDLE_S,
    ) -> None:
        """Raises ValueError for a setting that is out of range, by its name."""
        check("target_utilisation", target_utilisation, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
        check("target_queue_s", target_queue_s, "a number above 0", lambda value: value > 0)
        check("cooldown_s", cooldown_s, "a number of at least 0", lambda value: value >= 0)
        if max_replicas_in_all is not None:
            meant = "a whole number of at least 1"
            check("max_replicas_in_all", max_replicas_in_all, meant, lambda value: value >= 1 and value == int(value))
        for name, seconds in idle_s.items() if isinstance(idle_s, Mapping) else (("", idle_s),):
            setting = f"idle_s.{name}" if name else "idle_s"
            check(setting, seconds, "a number above 0, or one for each model by its name", lambda value: value > 0)
        self.idle_s = idle_s
        self.target_utilisation = target_utilisation
        self.target_queue_s = target_queue_s
        self.cooldown_s = cooldown_s
        self.max_replicas_in_all = max_replicas_in_all

    def __call__(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Replicas, and the state to keep, by DeploymentID; none for models that sleep (serve_app.scale_to_zero)."""
        return scale_to_zero.with_sleep(contexts, self.of_awake, self.idle_s, model_of, self.max_replicas_in_all)

    def of_awake(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """The same for the models that are awake."""
        needed = self.needed(contexts)
        peaks = {deployment: self.peaks(contexts[deployment], count) for deployment, count in needed.items()}
        replicas = [most[0][1] for most in peaks.values()]
        if self.max_replicas_in_all is not None:
            least = [contexts[deployment].capacity_adjusted_min_replicas for deployment in needed]
            replicas = fit(list(needed.values()), replicas, self.max_replicas_in_all, least)
        return dict(zip(needed, replicas, strict=True)), {key: {PEAKS: value} for key, value in peaks.items()}

    def needed(self, contexts: Mapping[Any, AutoscalingContext]) -> dict[Any, int]:
        """The replicas that the work of this moment asks for, within each deployment's bounds.

        Requests go through the stages of one model: those of the others hear nothing of them.
        """
        of_models: dict[str, dict[Any, AutoscalingContext]] = {}
        for deployment, context in contexts.items():
            of_models.setdefault(model_of(deployment), {})[deployment] = context
        return {key: count for each in of_models.values() for key, count in self.needed_by_one(each).items()}

    def needed_by_one(self, contexts: Mapping[Any, AutoscalingContext]) -> dict[Any, int]:
        """The same for the deployments of one model."""
        work = {deployment: stage_work(context) for deployment, context in contexts.items()}
        rates = work_rates(list(work.values()))
        most = most_requests(list(contexts.values()))
        needed = {}
        for (deployment, context), rate in zip(contexts.items(), rates, strict=True):
            if any(stage.request_s for stage in work[deployment].values()):
                queue_s = queued_s(list(work[deployment].values()), context.current_num_replicas)
                wanted = max(rate / self.target_utilisation, rate + queue_s / self.target_queue_s)
                wanted = max(min(wanted, most), long_at_work(context, self.target_queue_s))
            else:  # nothing is measured yet: what Serve's own policy would say
                wanted = context.total_num_requests / context.config.get_target_ongoing_requests()
            bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
            needed[deployment] = max(bounds[0], min(bounds[1], math.ceil(wanted - 1e-9)))
        return needed

    def peaks(self, context: AutoscalingContext, needed: int) -> Peaks:
        """What was needed in the last `cooldown_s`, its maximum first; at the start, the replicas that are there."""
        now = context.current_time
        assert now is not None
        before: Peaks = context.policy_state.get(PEAKS, ((now, context.target_num_replicas),))
        kept = [(time_s, count) for time_s, count in before if time_s > now - self.cooldown_s and count > needed]
        return (*kept, (now, needed))


def model_of(deployment: Any) -> str:
    """Deployments are called Denoiser-MODEL where there are several models (deployments.replicas.table)."""
    return str(getattr(deployment, "name", deployment)).partition("-")[2]


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
    presents = [
        values[::-1]  # replicas report in step: those as old as each other belong together
        for context in contexts
        for stage in STAGES
        for values in Reports(context, context.config.look_back_period_s).values(stage, "present")
    ]
    ages = range(max(map(len, presents), default=0))
    at_once = max((sum(values[age] for values in presents if age < len(values)) for age in ages), default=0.0)
    refused = sum(
        Reports(context, context.config.look_back_period_s).rise(stage, "refused")
        for context in contexts
        for stage in STAGES
    )
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
        spans = [each[-1].timestamp - each[0].timestamp for stage in STAGES for each in self.series(stage)]
        # A replica that has just started cannot know how much comes in a second.
        self._seconds: float = max([period_s / 2, *spans])

    def series(self, stage: str, number: str = "arrived") -> list[list[Any]]:
        """By replica, each with its time stamps."""
        return [
            [each for each in series if each.timestamp >= series[-1].timestamp - self._period_s - 1e-3]
            for series in self._raw.get(f"{stage}_{number}", {}).values()
            if series
        ]

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


def fit(now: Sequence[int], held: Sequence[int], most: int, least: Sequence[int] | None = None) -> list[int]:
    """`held` where it fits; else what is needed `now`, and what is left over in proportion to the rest."""
    if sum(held) <= most:
        return list(held)
    if sum(now) >= most:
        return proportional(now, most, least)
    extra = [a - b for a, b in zip(held, now, strict=True)]
    left = most - sum(now)
    return [b + math.floor(left * a / sum(extra)) for a, b in zip(extra, now, strict=True)]


def proportional(weights: Sequence[float], total: int, least: Sequence[int] | None = None) -> list[int]:
    """`total`, at least the sum of `least`, split in proportion to `weights`; each gets its `least` (1); by largest
    remainder."""
    least = [1] * len(weights) if least is None else least
    rest = total - sum(least)
    exact = [max(0.0, total * weight / sum(weights) - own) for weight, own in zip(weights, least, strict=True)]
    scale = rest / sum(exact) if sum(exact) else 0.0
    shares = [own + math.floor(scale * part + 1e-9) for part, own in zip(exact, least, strict=True)]
    order = sorted(range(len(weights)), key=lambda i: shares[i] - least[i] - scale * exact[i])
    for index in order[: max(0, total - sum(shares))]:
        shares[index] += 1
    return shares


def check(name: str, value: Any, meant: str, is_meant: Callable[[Any], bool]) -> None:
    """Raises ValueError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not is_meant(value):
        raise ValueError(f"{name} must be {meant}, got {value!r}")
