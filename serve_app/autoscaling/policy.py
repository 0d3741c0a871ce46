"""How many replicas each deployment gets, by the work of all of them and the accelerators that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from serve_app.autoscaling.pool import Demand, share, take_turns
from serve_app.autoscaling.sleep import DEFAULT_IDLE_S, IdleS, with_sleep
from serve_app.autoscaling.steady import Steadied, steadied
from serve_app.autoscaling.turns import TURN, Place, turns_of
from serve_app.autoscaling.work import (
    load_s,
    long_at_work,
    most_requests,
    queued_s,
    stage_work,
    work_rates,
)

# In the state that Serve keeps for each deployment.
PEAKS, STEADIED, LOAD_S, DECIDED = ("peaks", "steadied", "load_s", "decided")
KEPT = (PEAKS, STEADIED, TURN, LOAD_S, DECIDED)
DECIDE_EVERY_S = 1.0  # replicas report every 10 s; a decision for 1,000 of them keeps the controller busy for 50 ms

Peaks = tuple[tuple[float, int], ...]  # (time in seconds, replicas needed then): times rise, replicas fall
State = dict[str, Any]


class ReplicaRatio:
    """Called by Serve's controller ten times a second, for the deployments that have an `autoscaling_config`.

    A deployment gets the replicas that do the work which comes in at `target_utilisation`, or those which besides
    do what is queued within `target_queue_s`, whichever is more; and no more than there were requests at once.
    More replicas start at once. One goes when it was not needed for `cooldown_s`.

    With `accelerators` the deployments of all models share so many (`serve_app.autoscaling.pool`). A replica takes one,
    or what `accelerators_each` says of its deployment. `priorities`: by the model's name, 1 where none is written.

    The decision depends on the arguments only: what must be remembered is in the state that Serve hands back.
    """

    def __init__(
        self,
        target_utilisation: float = 0.8,
        target_queue_s: float = 15.0,
        cooldown_s: float = 180.0,
        accelerators: float | None = None,
        accelerators_each: Mapping[str, float] | None = None,
        priorities: Mapping[str, float] | None = None,
        idle_s: IdleS = DEFAULT_IDLE_S,
    ) -> None:
        """Raises ValueError for a setting that is out of range, by its name."""
        check("target_utilisation", target_utilisation, "a number above 0 and at most 1", lambda value: 0 < value <= 1)
        check("target_queue_s", target_queue_s, "a number above 0", lambda value: value > 0)
        check("cooldown_s", cooldown_s, "a number of at least 0", lambda value: value >= 0)
        if accelerators is not None:
            check("accelerators", accelerators, "a number above 0", lambda value: value > 0)
        for name, given in (("accelerators_each", accelerators_each), ("priorities", priorities)):
            if given is not None and accelerators is None:
                raise ValueError(f"{name} has an effect only with accelerators, the number that all share")
            if given is not None and not isinstance(given, Mapping):
                raise ValueError(f"{name} must be a mapping of names to numbers, got {given!r}")
        for key, value in (accelerators_each or {}).items():
            check(f"accelerators_each[{key}]", value, "a number of at least 0", lambda value: value >= 0)
        for key, value in (priorities or {}).items():
            check(f"priorities[{key}]", value, "a number above 0", lambda value: value > 0)
        for name, seconds in idle_s.items() if isinstance(idle_s, Mapping) else (("", idle_s),):
            setting = f"idle_s.{name}" if name else "idle_s"
            check(setting, seconds, "a number above 0, or one for each model by its name", lambda value: value > 0)
        self.target_utilisation = target_utilisation
        self.target_queue_s = target_queue_s
        self.cooldown_s = cooldown_s
        self.accelerators = accelerators
        self.accelerators_each = dict(accelerators_each or {})
        self.priorities = dict(priorities or {})
        self.idle_s = idle_s

    def __call__(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, State]]:
        """Replicas, and the state to keep, by DeploymentID; none for models that sleep.

        A deployment without an answer stays as it is.
        """
        replicas, states = with_sleep(contexts, self.of_awake, self.idle_s, model_of)
        return {key: count for key, count in replicas.items() if not waits_its_turn(contexts[key], count)}, states

    def of_awake(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, State]]:
        """The same for the models that are awake."""
        if all(is_fresh(context) for context in contexts.values()):
            return (
                {key: context.policy_state[DECIDED][1] for key, context in contexts.items()},
                {key: kept(context.policy_state) for key, context in contexts.items()},
            )
        return self.decide(contexts)

    def decide(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, State]]:
        needed = self.needed(contexts)
        peaks = {key: self.peaks(contexts[key], math.ceil(count - 1e-9)) for key, count in needed.items()}
        states: dict[Any, State] = {key: {PEAKS: value} for key, value in peaks.items()}
        replicas = {key: value[0][1] for key, value in peaks.items()}
        if self.accelerators is not None:
            replicas = self.shared(contexts, needed, replicas, self.accelerators, states)
        for key, count in replicas.items():
            states[key][DECIDED] = (contexts[key].current_time, count, contexts[key].target_num_replicas)
        return replicas, states

    def needed(self, contexts: Mapping[Any, AutoscalingContext]) -> dict[Any, float]:
        """The replicas that the work of this moment asks for, within each deployment's bounds.

        Requests go through the stages of one model: those of the others hear nothing of them.
        """
        models = by_model(contexts).values()
        return {key: count for each in models for key, count in self.needed_by_one(each).items()}

    def needed_by_one(self, contexts: Mapping[Any, AutoscalingContext]) -> dict[Any, float]:
        """The same for the deployments of one model: while it has a request, each of them is needed."""
        work = {deployment: stage_work(context) for deployment, context in contexts.items()}
        rates = work_rates(list(work.values()))
        most = most_requests(list(contexts.values()))
        asked = 1.0 if is_asked(contexts.values()) else 0.0
        needed = {}
        for (deployment, context), rate in zip(contexts.items(), rates, strict=True):
            if any(stage.request_s for stage in work[deployment].values()):
                queue_s = queued_s(list(work[deployment].values()), context.current_num_replicas)
                wanted = max(rate / self.target_utilisation, rate + queue_s / self.target_queue_s)
                wanted = max(min(wanted, most), long_at_work(context, self.target_queue_s))
            else:  # nothing is measured yet: what Serve's own policy would say
                wanted = context.total_num_requests / context.config.get_target_ongoing_requests()
            bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
            needed[deployment] = max(bounds[0], min(bounds[1], max(asked, wanted)))
        return needed

    def peaks(self, context: AutoscalingContext, needed: int) -> Peaks:
        """What was needed in the last `cooldown_s`, its maximum first; at the start, the replicas that are there."""
        now = context.current_time
        assert now is not None
        before: Peaks = context.policy_state.get(PEAKS, ((now, context.target_num_replicas),))
        kept = [(time_s, count) for time_s, count in before if time_s > now - self.cooldown_s and count > needed]
        return (*kept, (now, needed))

    def shared(
        self,
        contexts: Mapping[Any, AutoscalingContext],
        needed: Mapping[Any, float],
        held: Mapping[Any, int],
        pool: float,
        states: dict[Any, State],
    ) -> dict[Any, int]:
        """Replicas within the accelerators of the pool; adds to `states` what this must remember."""
        loads = {key: load_s(context, context.policy_state.get(LOAD_S, 0.0)) for key, context in contexts.items()}
        before = {key: steadied_before(contexts[key], count, loads[key]) for key, count in needed.items()}
        asked = asked_models(contexts)
        demands = {
            key: self.demand(key, context, needed[key], held[key], before[key], model_of(key) in asked)
            for key, context in contexts.items()
        }
        turns = turns_of(contexts, loads, demands)
        time_s = max((context.current_time or 0.0 for context in contexts.values()), default=0.0)
        given = take_turns(pool, list(demands.values()), turns, time_s)
        replicas = dict(zip(demands, share(pool, list(demands.values()), given), strict=True))
        for key, demand in demands.items():
            turn = turns[demand.model]
            since_s = turn.since_s if turn.given == (demand.model in given) else time_s
            states[key][TURN] = Place(demand.model in given, since_s, turn.runs)
            states[key][STEADIED] = before[key].with_starts(replicas[key] - demand.have)
            states[key][LOAD_S] = loads[key]
        return replicas

    def demand(
        self, deployment: Any, context: AutoscalingContext, needed: float, held: int, before: Steadied, is_asked: bool
    ) -> Demand:
        model = model_of(deployment)
        least = min(context.capacity_adjusted_min_replicas, context.config.min_replicas)
        if not is_asked:  # awake, and it yields to those that have work
            needed = least
        return Demand(
            model,
            now=needed,
            fair=before.needed if is_asked else float(least),
            is_firm=before.is_firm,
            held=held,
            least=least,
            have=context.target_num_replicas,
            accelerators=self.accelerators_each.get(name_of(deployment), 1.0),
            priority=self.priorities.get(model, 1.0),
        )


def by_model(contexts: Mapping[Any, AutoscalingContext]) -> dict[str, dict[Any, AutoscalingContext]]:
    models: dict[str, dict[Any, AutoscalingContext]] = {}
    for deployment, context in contexts.items():
        models.setdefault(model_of(deployment), {})[deployment] = context
    return models


def asked_models(contexts: Mapping[Any, AutoscalingContext]) -> set[str]:
    return {name for name, own in by_model(contexts).items() if is_asked(own.values())}


def is_asked(contexts: Collection[AutoscalingContext]) -> bool:
    """Whether the model of these deployments has a request."""
    return any(context.total_num_requests for context in contexts) or most_requests(list(contexts)) > 0


def waits_its_turn(context: AutoscalingContext, count: int) -> bool:
    """Serve starts a replica for a call that waits, even where the answer is none; without an answer it does not."""
    return count == 0 and context.target_num_replicas == 0 and context.total_num_requests > 0


def is_fresh(context: AutoscalingContext) -> bool:
    """Whether a decision was made a moment ago, and followed: nothing new is known."""
    decided, now = context.policy_state.get(DECIDED), context.current_time
    if decided is None or now is None:
        return False
    time_s, *targets = decided  # what was decided, and what there was: Serve may hold on to that
    return bool(0 <= now - time_s < DECIDE_EVERY_S and context.target_num_replicas in targets)


def kept(state: Mapping[str, Any]) -> State:
    return {key: state[key] for key in KEPT if key in state}


def steadied_before(context: AutoscalingContext, needed: float, seconds: float) -> Steadied:
    """What is remembered of the deployment's need and starts, brought up to this moment."""
    now = context.current_time
    assert now is not None
    return steadied(context.policy_state.get(STEADIED), needed, seconds, now)


def name_of(deployment: Any) -> str:
    return str(getattr(deployment, "name", deployment))


def model_of(deployment: Any) -> str:
    """Deployments are called Denoiser-MODEL where there are several models (deployments.replicas.table)."""
    return name_of(deployment).partition("-")[2]


def check(name: str, value: Any, meant: str, is_meant: Callable[[Any], bool]) -> None:
    """Raises ValueError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not is_meant(value):
        raise ValueError(f"{name} must be {meant}, got {value!r}")
