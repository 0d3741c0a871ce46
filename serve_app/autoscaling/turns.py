"""Which models have a place in a pool that is too small for all of them, and since when.

A turn begins when all deployments of the model run and have work. A model that loads keeps its place for as long as
loads take at most; one that found the accelerators free before it keeps them instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

from serve_app.autoscaling.pool import Demand, Turn

TURN = "turn"  # in the state that Serve keeps for each deployment
TURN_IN_LOADS = 3.0  # how long a model keeps its place while others wait, in times of its own loading
LEAST_TURN_S = 60.0
LONGEST_LOAD_S = 600.0  # of a model that keeps its place while it loads, where three of its own loads are no longer


@dataclass(frozen=True)
class Place:
    """What is remembered of a model's place in the pool."""

    given: bool
    since_s: float  # when it was given or lost, or when the model began to run in it
    ran: bool  # with a place: since it was given; else at the last look


@dataclass(frozen=True)
class Look:
    """What there is of one model at this moment."""

    works: bool
    runs: bool  # each deployment that it has or needs
    has: bool  # replicas, those that still start among them
    holds: bool  # accelerators beyond those of min_replicas
    place: Place


def turns_of(
    contexts: Mapping[Any, AutoscalingContext], loads: Mapping[Any, float], demands: Mapping[Any, Demand]
) -> dict[str, Turn]:
    """Each model's turn until now, by its name."""
    now_s = max((context.current_time or 0.0 for context in contexts.values()), default=0.0)
    keys: dict[str, list[Any]] = {}
    for key, demand in demands.items():
        keys.setdefault(demand.model, []).append(key)
    looks = {
        model: look({key: contexts[key] for key in own}, {key: demands[key] for key in own}, now_s)
        for model, own in keys.items()
    }
    return {
        model: turn(
            each, [other for name, other in looks.items() if name != model], now_s, max(loads[key] for key in own)
        )
        for (model, each), own in zip(looks.items(), keys.values(), strict=True)
    }


def look(contexts: Mapping[Any, AutoscalingContext], demands: Mapping[Any, Demand], now_s: float) -> Look:
    works = any(demand.now > 0 for demand in demands.values())
    has = any(context.target_num_replicas > 0 for context in contexts.values())
    needed = [each for key, each in contexts.items() if demands[key].now > 0 or each.target_num_replicas > 0]
    runs = bool(needed) and all(context.current_num_replicas > 0 for context in needed)
    holds = any(context.current_num_replicas > demands[key].least for key, context in contexts.items())
    told = [context.policy_state[TURN] for context in contexts.values() if TURN in context.policy_state]
    # Without work no model waits and no turn passes; without replicas none has a place.
    is_known = bool(told) and works and (has or not told[0].given)
    place = told[0] if is_known else Place(has, now_s, runs)
    return Look(works, runs, has, holds, place)


def turn(own: Look, others: list[Look], now_s: float, load_s: float) -> Turn:
    given, since_s, begins = own.place.given, own.place.since_s, own.runs and not own.place.ran
    if not given and begins and own.has and any(map(still_loads, others)):
        given = True  # Serve cannot take back a replica that calls wait for, and this one found room before
    if given and begins:
        since_s = now_s
    if given and not own.runs and not own.place.ran and any(other.holds and not other.place.given for other in others):
        since_s = now_s  # Serve still holds on to what it was told to stop
    runs = own.runs or (own.place.given and own.place.ran)
    return Turn(given, since_s, max(LEAST_TURN_S if runs else LONGEST_LOAD_S, TURN_IN_LOADS * load_s), runs)


def still_loads(model: Look) -> bool:
    """Whether it has a place and work, and not yet all that it needs for it."""
    return model.place.given and model.works and not model.runs and not model.place.ran
