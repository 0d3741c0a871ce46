"""Which models give all their replicas back, and when they get them again.

A model may sleep where `min_replicas` of its deployments is 0. Those of one model go together, when no request came
for `idle_s`, and come back together, when one waits for any of them.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.experimental import internal_kv
from ray.serve.config import AutoscalingContext

STAGES = ("encoder", "denoiser", "vae")
CAME = ("arrived", "refused")  # of each stage: requests since the start of a replica
SLEEP = "sleep"  # in the state that Serve keeps for each deployment
DEFAULT_IDLE_S = 600.0  # of a model that a mapping does not name
USED = "triptych-used"  # the namespace in Ray's store where an ingress writes when a request came to a model
BETWEEN_MODELS = "+"  # in the name of the models of a deployment that several share

Contexts = Mapping[Any, AutoscalingContext]
Decision = tuple[dict[Any, int], dict[Any, dict[str, Any]]]  # replicas, and the state to keep, by DeploymentID
IdleS = float | Mapping[str, float]  # seconds, of all models or by the name of each
State = tuple[float, float]  # when the last request came by the controller's clock (-inf: never), how many had come


@dataclass(frozen=True)
class ModelIdle:
    """What is known of the requests of one model."""

    name: str
    deployments: Contexts
    is_asked: bool  # a request waits, or is in work, or the replicas for one start
    state: State

    @property
    def may_sleep(self) -> bool:
        return any(map(is_sleeper, self.deployments.values()))

    @property
    def idle_s(self) -> float:
        return now_of(self.deployments.values()) - self.state[0]


def with_sleep(
    contexts: Contexts,
    decide: Callable[[Contexts], Decision],
    idle_s: IdleS,
    model_of: Callable[[Any], str],
) -> Decision:
    """What `decide` says of the models that are awake, each deployment with one replica at least; none of the others.

    What several models share is awake while one of them is. `decide` may still give an awake one nothing, where all
    share too few accelerators.
    """
    models = [look(name, each) for name, each in by_model(contexts, model_of).items()]
    awake = [model for model in models if not has_had_its_time(model, idle_s) or was_used(model, own_s(model, idle_s))]
    names = {model.name for model in awake}
    awake = [model for model in models if names.intersection((model.name, *model.name.split(BETWEEN_MODELS)))]
    told: dict[Any, AutoscalingContext] = {}
    states: dict[Any, dict[str, Any]] = {}
    for model in models:
        is_awake = any(model is each for each in awake)
        last, came = model.state
        state = (last if is_awake or model.is_asked else -math.inf, came)
        for key, context in model.deployments.items():
            if not is_sleeper(context):
                told[key] = context
                continue
            states[key] = {SLEEP: state}
            if is_awake:
                told[key] = with_one_at_least(context)
    replicas, kept = decide(told)
    return (
        {key: replicas.get(key, 0) for key in contexts},
        {key: kept.get(key, {}) | states.get(key, {}) for key in contexts},
    )


def by_model(contexts: Contexts, model_of: Callable[[Any], str]) -> dict[str, dict[Any, AutoscalingContext]]:
    models: dict[str, dict[Any, AutoscalingContext]] = {}
    for key, context in contexts.items():
        models.setdefault(model_of(key), {})[key] = context
    return models


def look(name: str, deployments: Contexts) -> ModelIdle:
    """The requests of one model, as its replicas and its callers report them."""
    contexts = list(deployments.values())
    now = now_of(contexts)
    before: State | None = next((each.policy_state[SLEEP] for each in contexts if SLEEP in each.policy_state), None)
    came = sum(last_of(each, number) for each in contexts for number in CAME)
    is_asked = any(each.total_num_requests > 0 or last_of(each, "present") > 0 or starts(each) for each in contexts)
    if is_asked:
        last = now
    elif before is None:  # the first look since a deploy, or since the start of the controller
        last = now if any(each.target_num_replicas > 0 for each in contexts if is_sleeper(each)) else -math.inf
    elif came > before[1]:
        last = now
    else:
        last = max(before[0], *map(newest_arrival, contexts))
    return ModelIdle(name, deployments, is_asked, (last, came))


def now_of(contexts: Iterable[AutoscalingContext]) -> float:
    return max((each.current_time or 0.0 for each in contexts), default=0.0)


def is_sleeper(context: AutoscalingContext) -> bool:
    return bool(context.capacity_adjusted_min_replicas == 0)


def starts(context: AutoscalingContext) -> bool:
    """Replicas that load are no sign of idleness, however long that takes."""
    return bool(context.target_num_replicas > 0 and context.current_num_replicas == 0)


def series_of(context: AutoscalingContext, number: str) -> list[list[Any]]:
    """Of each stage and replica, over time."""
    raw = context.raw_metrics or {}
    return [series for stage in STAGES for series in raw.get(f"{stage}_{number}", {}).values() if series]


def last_of(context: AutoscalingContext, number: str) -> float:
    return float(sum(series[-1].value for series in series_of(context, number)))


def newest_arrival(context: AutoscalingContext) -> float:
    """When a replica first told of the last request that came to it; -inf: none in the look-back period."""
    rises = [
        later.timestamp
        for number in CAME
        for series in series_of(context, number)
        for earlier, later in itertools.pairwise(series)
        if later.value > earlier.value
    ]
    return max(rises, default=-math.inf)


def has_had_its_time(model: ModelIdle, idle_s: IdleS) -> bool:
    """Whether it may sleep, and no request came for so long."""
    return model.may_sleep and not model.is_asked and model.idle_s >= own_s(model, idle_s)


def own_s(model: ModelIdle, idle_s: IdleS) -> float:
    if not isinstance(idle_s, Mapping):
        return idle_s
    known = [idle_s[name] for name in (model.name, *model.name.split(BETWEEN_MODELS)) if name in idle_s]
    return max(known, default=DEFAULT_IDLE_S)


def was_used(model: ModelIdle, within_s: float) -> bool:
    """Whether a request came that is not reported yet; asked only when replicas are to go."""
    goes = any(is_sleeper(each) and each.target_num_replicas > 0 for each in model.deployments.values())
    return goes and now_of(model.deployments.values()) - max(map(used_at, model.deployments.values())) < within_s


def used_at(context: AutoscalingContext) -> float:
    """When an ingress last had a request for this deployment; -inf: it never told."""
    try:
        key = f"{context.app_name}/{context.deployment_name}"
        told = internal_kv._internal_kv_get(key, namespace=USED) if internal_kv._internal_kv_initialized() else None
        return float(told) if told else -math.inf
    except Exception:  # noqa: BLE001  (Ray's store is away: what the replicas report must do)
        return -math.inf


def with_one_at_least(context: AutoscalingContext) -> AutoscalingContext:
    """The same deployment, told as one that never sleeps; before the first replica works no second one loads."""
    told = copy.copy(context)
    told.capacity_adjusted_min_replicas = 1
    if context.current_num_replicas == 0:
        told.capacity_adjusted_max_replicas = 1
    return told
