"""How many replicas each stage gets: fixed, by Serve's default policy, or by the ratio of the stages' work."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.cluster_simulation import View


class Fixed:
    """As many as at the start."""

    def __init__(self, replicas: Sequence[int]) -> None:
        self.replicas = tuple(replicas)

    def __call__(self, view: View) -> Sequence[int]:
        return self.replicas


class ServeDefault:
    """Serve's own policy and delays, called as its controller does, for each stage by itself."""

    def __init__(self, num_stages: int, max_replicas: int, **settings: Any) -> None:
        """`settings` are those of autoscaling_config; what is not named has Serve's default."""
        self.config = AutoscalingConfig(min_replicas=1, max_replicas=max_replicas, **settings)
        self.states: list[dict[str, Any]] = [{} for _ in range(num_stages)]

    def __call__(self, view: View) -> Sequence[int]:
        return [self.of_stage(view, stage) for stage in range(len(self.states))]

    def of_stage(self, view: View, stage: int) -> int:
        running, target = view.running[stage], view.target[stage]
        context: Any = AutoscalingContext(
            deployment_id=None,
            deployment_name="",
            app_name=None,
            current_num_replicas=running,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=view.mean_ongoing(stage, self.config.look_back_period_s),
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=self.states[stage],
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=view.time_s,
            config=self.config,
        )
        desired, _ = replica_queue_length_autoscaling_policy(context)
        # What Serve's _apply_default_params does, with the simulation's clock.
        desired = max(0, _apply_scaling_factors(desired, running, self.config))
        decided, self.states[stage] = _apply_delay_logic(desired, target, self.config, self.states[stage], view.time_s)
        return int(max(self.config.min_replicas, min(self.config.max_replicas, decided)))


class ReplicaRatio:
    """Replicas by the seconds of work that each stage has to do, and by their ratio when not all fit.

    A stage gets what the work that comes in needs at `utilization`, or what also does the waiting work within
    `catch_up_s`, whichever is more. More replicas at once; fewer only when none of the last `hold_s` needed them.
    """

    def __init__(
        self, num_accelerators: int, utilization: float = 0.8, catch_up_s: float = 30, hold_s: float = 180
    ) -> None:
        self.num_accelerators, self.utilization = num_accelerators, utilization
        self.catch_up_s, self.hold_s = catch_up_s, hold_s
        self.recent: deque[tuple[float, list[int]]] = deque()
        self.decided: tuple[int, ...] = ()

    def __call__(self, view: View) -> Sequence[int]:
        last = view.reports[-1]
        if self.recent and self.recent[-1][0] == last.time_s:
            return self.decided  # nothing new was reported
        self.recent.append((last.time_s, self.needed(view)))
        while self.recent[0][0] < last.time_s - self.hold_s:
            self.recent.popleft()
        now = self.recent[-1][1]
        held = [max(needed) for needed in zip(*(needed for _, needed in self.recent), strict=True)]
        if len(view.reports) < 3:  # too early to know the rate
            held = [max(pair) for pair in zip(held, view.target, strict=True)]
        self.decided = tuple(fit(now, held, self.num_accelerators))
        return self.decided

    def needed(self, view: View) -> list[int]:
        last = view.reports[-1]
        rates = [self.rate(view, stage) for stage in range(len(view.running))]
        return [
            max(1, math.ceil(max(rate / self.utilization, rate + waiting_s / self.catch_up_s)))
            for rate, waiting_s in zip(rates, last.waiting_s, strict=True)
        ]

    def rate(self, view: View, stage: int) -> float:
        """Seconds of work that come in per second: of the last reports, or of the very last if that is more.

        A single report of a few requests is mostly chance, so it counts less two of its standard deviations.
        """
        reports = list(view.reports)[-4:]
        if len(reports) < 2:
            return 0.0
        last, before, first = reports[-1], reports[-2], reports[0]
        mean = (last.arrived_s[stage] - first.arrived_s[stage]) / (last.time_s - first.time_s)
        newest = (last.arrived_s[stage] - before.arrived_s[stage]) / (last.time_s - before.time_s)
        num_newest = max(1, last.num_arrived - before.num_arrived)
        return max(mean, newest * (1 - 2 / math.sqrt(num_newest)))


def fit(now: Sequence[int], held: Sequence[int], most: int) -> list[int]:
    """`held` where it fits; else what is needed `now`, and what is left over in proportion to the rest."""
    if sum(held) <= most:
        return list(held)
    if sum(now) >= most:
        return proportional(now, most)
    extra = [a - b for a, b in zip(held, now, strict=True)]
    left = most - sum(now)
    return [b + math.floor(left * a / sum(extra)) for a, b in zip(extra, now, strict=True)]


def proportional(weights: Sequence[float], total: int) -> list[int]:
    """`total` split in proportion to `weights`, at least 1 each; by largest remainder."""
    rest = total - len(weights)
    exact = [max(0.0, total * weight / sum(weights) - 1) for weight in weights]
    scale = rest / sum(exact) if sum(exact) else 0.0
    shares = [1 + math.floor(scale * part + 1e-9) for part in exact]
    order = sorted(range(len(weights)), key=lambda i: shares[i] - 1 - scale * exact[i])
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares
