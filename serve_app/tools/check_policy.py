"""Problems of the settings of our autoscaling policy in a Serve config file, beside the deployments that scale."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig

from env_config.closest import hint
from env_config.serve_config import mapping_or_empty
from serve_app.autoscaling import ReplicaRatio, model_of
from serve_app.autoscaling.sleep import BETWEEN_MODELS


@dataclass(frozen=True)
class Scaling:
    """A deployment that scales."""

    name: str
    least: int  # its min_replicas
    gpus: float  # of one replica
    counted: float  # accelerators of one replica, as the policy counts them

    @property
    def model(self) -> str:
        return model_of(self.name)


def check_our_policy(settings: Any, deployments: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """`deployments`: those of the file that have an autoscaling_config."""
    if not isinstance(settings, Mapping):
        return [f"{where}: must be a mapping, got {settings!r}"]
    known = inspect.signature(ReplicaRatio).parameters
    unknown = [f"{where}.{key}: unknown key{hint(key, known)}" for key in settings if key not in known]
    if unknown:
        return unknown
    try:
        policy = ReplicaRatio(**settings)
    except ValueError as error:
        return [f"{where}: {error}"]
    try:
        scaling = [scaling_of(each, policy) for each in deployments]
    except ValidationError:  # Serve's own schema names it
        return []
    checks = (unknown_names, miscounted, without_room)
    return [f"{where}.{problem}" for check in checks for problem in check(policy, scaling)]


def scaling_of(deployment: Mapping[str, Any], policy: ReplicaRatio) -> Scaling:
    """Raises ValidationError."""
    name = str(deployment.get("name"))
    least = AutoscalingConfig(**deployment["autoscaling_config"]).min_replicas or 0
    return Scaling(name, least, num_gpus(deployment), policy.accelerators_each.get(name, 1.0))


def unknown_names(policy: ReplicaRatio, scaling: Sequence[Scaling]) -> Iterator[str]:
    """Names that nothing has."""
    names = [each.name for each in scaling]
    models = {each.model for each in scaling}
    sleepers = {each.model for each in scaling if not each.least}
    for name in policy.accelerators_each:
        if name not in names:
            yield f"accelerators_each.{name}: no deployment of this name has an autoscaling_config{hint(name, names)}"
    for name in policy.priorities:
        if name not in models:
            told = "no deployment with an autoscaling_config belongs to this model"
            yield f"priorities.{name}: {told}{hint(name, models)}"
    for name in policy.idle_s if isinstance(policy.idle_s, Mapping) else ():
        if name not in sleepers:
            yield f"idle_s.{name}: no deployment of a model {name!r} has min_replicas: 0{hint(name, sleepers)}"


def miscounted(policy: ReplicaRatio, scaling: Sequence[Scaling]) -> Iterator[str]:
    """Replicas that take other than they are counted as."""
    if policy.accelerators is None or not any(each.gpus for each in scaling):  # without a GPU: places on CPUs
        return
    for each in scaling:
        if each.gpus != each.counted:
            yield (
                f"accelerators_each.{each.name}: a replica takes {each.gpus:g} GPUs and is counted as "
                f"{each.counted:g}; write {each.name}: {each.gpus:g}"
            )


def without_room(policy: ReplicaRatio, scaling: Sequence[Scaling]) -> Iterator[str]:
    """Whether what is always there, and each model beside it when it is awake, finds its accelerators."""
    pool = policy.accelerators
    if pool is None:
        return
    always = sum(each.least * each.counted for each in scaling)
    if always > pool:
        yield f"accelerators: {pool:g} is less than min_replicas of the deployments take, {always:g} together"
        return
    sleepers = [each for each in scaling if not each.least]
    for model in dict.fromkeys(name for each in sleepers for name in each.model.split(BETWEEN_MODELS)):
        more = sum(each.counted for each in sleepers if model in each.model.split(BETWEEN_MODELS))
        if always + more > pool:
            yield (
                f"accelerators: {pool:g} leaves no room for {model}, whose deployments need {more:g} when it is "
                f"awake, beside the {always:g} that are always taken"
            )


def num_gpus(deployment: Mapping[str, Any]) -> float:
    """Of one replica, those of its placement group included; 0 where it is not written as a number."""
    bundles = deployment.get("placement_group_bundles")
    own = mapping_or_empty(deployment.get("ray_actor_options")).get("num_gpus")
    told = [mapping_or_empty(each).get("GPU") for each in bundles] if isinstance(bundles, list) and bundles else [own]
    return float(sum(each for each in told if isinstance(each, int | float)))
