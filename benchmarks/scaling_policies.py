"""How many replicas each stage gets: fixed, by Serve's default policy, or by the ratio of the stages' work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ray.serve._private.common import TimeStampedValue
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.cluster_simulation import Stage, View
from serve_app import autoscaling
from serve_app.autoscaling.work import STAGES

ONE_MODEL = tuple(Stage(name) for name in STAGES)


def proportional(weights: Sequence[float], total: int) -> list[int]:
    """`total` split in proportion to `weights`, by largest remainder; each gets 1 at least."""
    rest = total - len(weights)
    exact = [max(0.0, total * weight / sum(weights) - 1) for weight in weights]
    scale = rest / sum(exact) if sum(exact) else 0.0
    shares = [1 + math.floor(scale * part + 1e-9) for part in exact]
    order = sorted(range(len(weights)), key=lambda i: shares[i] - 1 - scale * exact[i])
    for index in order[: max(0, total - sum(shares))]:
        shares[index] += 1
    return shares


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
        mean_ongoing = view.mean_ongoing(stage, self.config.look_back_period_s)
        told = context(self.config, self.states[stage], view, stage, total_num_requests=mean_ongoing)
        desired, _ = replica_queue_length_autoscaling_policy(told)
        # What Serve's _apply_default_params does, with the simulation's clock.
        desired = max(0, _apply_scaling_factors(desired, running, self.config))
        decided, self.states[stage] = _apply_delay_logic(desired, target, self.config, self.states[stage], view.time_s)
        return int(max(self.config.min_replicas, min(self.config.max_replicas, decided)))


class ReplicaRatio:
    """The product's policy, called as Serve's controller does: for all stages of all models together.

    The simulation reports a stage as one replica would that did all its work, with what waits at the callers.
    """

    def __init__(self, num_accelerators: int, stages: Sequence[Stage] = ONE_MODEL, **settings: Any) -> None:
        """`settings` are those of policy_kwargs; what is not named has its default.

        `stages` are called STAGE-MODEL, or STAGE where there is one model: encoder, denoiser or vae.
        """
        self.stages = stages
        each = {stage.name: stage.accelerators for stage in stages}
        self.policy = autoscaling.ReplicaRatio(accelerators=num_accelerators, **{"accelerators_each": each, **settings})
        self.config = AutoscalingConfig(
            min_replicas=1, max_replicas=num_accelerators, upscale_delay_s=0, downscale_delay_s=0
        )
        self.states: dict[str, dict[str, Any]] = {}
        self.decided: tuple[float, list[int]] | None = None  # at the time of the last report

    def __call__(self, view: View) -> Sequence[int]:
        reported_s = view.reports[-1].time_s
        if self.decided is None or self.decided[0] != reported_s:  # else nothing new is known
            contexts = {stage.name: self.context(view, number) for number, stage in enumerate(self.stages)}
            replicas, self.states = self.policy(contexts)
            self.decided = reported_s, list(replicas.values())
        return self.decided[1]

    def context(self, view: View, stage: int) -> AutoscalingContext:
        since_s = view.reports[-1].time_s - self.config.look_back_period_s
        reports = [report for report in view.reports if report.time_s >= since_s]
        deployment = self.stages[stage]
        name = deployment.name.partition("-")[0]
        series = {
            "busy_s": [report.arrived_s[stage] - report.outstanding_s[stage] for report in reports],
            "outstanding_s": [report.outstanding_s[stage] for report in reports],
            "request_s": [report.request_s[stage] for report in reports],
            "arrived": [report.arrived[stage] for report in reports],
            "refused": [report.refused[stage] for report in reports],
            "present": [report.ongoing[stage] for report in reports],
        }
        times_s = [report.time_s for report in reports]
        return context(
            self.config,
            self.states.get(deployment.name, {}),
            view,
            stage,
            total_num_requests=view.mean_ongoing(stage, self.config.look_back_period_s),
            raw_metrics={
                f"{name}_{number}": {"all": [TimeStampedValue(*point) for point in zip(times_s, values, strict=True)]}
                for number, values in series.items()
            }
            | {"load_s": {"all": [TimeStampedValue(times_s[-1], deployment.start_s)]}},
        )


def context(
    config: AutoscalingConfig, state: dict[str, Any], view: View, stage: int, **metrics: Any
) -> AutoscalingContext:
    """What Serve's controller tells a policy of one deployment."""
    given: dict[str, Any] = {
        "deployment_id": None,
        "deployment_name": "",
        "app_name": None,
        "current_num_replicas": view.running[stage],
        "target_num_replicas": view.target[stage],
        "running_replicas": [],
        "total_queued_requests": None,
        "aggregated_metrics": None,
        "raw_metrics": None,
        "capacity_adjusted_min_replicas": config.min_replicas,
        "capacity_adjusted_max_replicas": config.max_replicas,
        "policy_state": state,
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": view.time_s,
        "config": config,
    }
    return AutoscalingContext(**given | metrics)
