"""Models that take turns at too few places, with a policy called as Serve calls it and replicas placed as by Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.autoscaling import ReplicaRatio

TICK_S = 1.0
LOAD_S = 20.0
REQUEST_S = 10.0


@dataclass
class Model:
    """One deployment with one replica at most, as Serve keeps it, and its calls."""

    name: str
    load_s: float = LOAD_S
    target: int = 0
    ready_s: float | None = None  # when the replica that has a place runs
    calls: list[float] = field(default_factory=list)  # seconds of work that each still needs; the first is at work
    done: int = 0
    starts: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def deployment(self) -> str:
        return f"Denoiser-{self.name}"

    def runs(self, now_s: float) -> bool:
        return self.ready_s is not None and self.ready_s <= now_s

    def context(self, now_s: float) -> AutoscalingContext:
        runs = self.runs(now_s)
        present = float(runs and bool(self.calls))
        told = {"denoiser_present": present, "load_s": self.load_s}
        given: dict[str, Any] = {
            "deployment_id": None, "deployment_name": self.deployment, "app_name": None,
            "current_num_replicas": int(runs), "target_num_replicas": self.target, "running_replicas": [],
            "total_num_requests": float(len(self.calls)), "total_queued_requests": len(self.calls) - present,
            "aggregated_metrics": None,
            "raw_metrics": {name: {"replica": [TimeStampedValue(now_s, told[name])]} for name in told if runs},
            "capacity_adjusted_min_replicas": 0, "capacity_adjusted_max_replicas": 1, "policy_state": self.state,
            "last_scale_up_time": None, "last_scale_down_time": None, "current_time": now_s,
            "config": AutoscalingConfig(min_replicas=0, max_replicas=1, upscale_delay_s=0, downscale_delay_s=0),
        }  # fmt: skip
        return AutoscalingContext(**given)


class Cluster:
    """The models at so many places. A place that is free goes to the first of `models` that waits for one.

    A replica that is told to stop does so at once, and the call that it worked on goes on later where it was.
    """

    def __init__(self, *models: Model, places: int = 1) -> None:
        self.models, self.places, self.now_s = models, places, 1000.0
        self.policy = _apply_app_level_autoscaling_config(ReplicaRatio(accelerators=places))  # type: ignore[arg-type]

    def ask(self, *models: Model) -> None:
        for each in models:
            each.calls.append(REQUEST_S)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            contexts: Any = {each.deployment: each.context(self.now_s) for each in self.models}
            decided: Any
            states: Any
            decided, states = self.policy(contexts)
            for each in self.models:
                each.target = decided.get(each.deployment, each.target)
                each.state = states[each.deployment]
            self.place()
            self.work()

    def place(self) -> None:
        for each in self.models:
            if not each.target:
                each.ready_s = None
        for each in self.models:
            taken = sum(other.ready_s is not None for other in self.models)
            if each.target and each.ready_s is None and taken < self.places:
                each.ready_s, each.starts = self.now_s + each.load_s, each.starts + 1

    def work(self) -> None:
        for each in self.models:
            if each.runs(self.now_s) and each.calls:
                each.calls[0] -= TICK_S
                if each.calls[0] <= 0:
                    each.calls.pop(0)
                    each.done += 1


@pytest.mark.parametrize("first_at_the_place", ["a", "b"])
@pytest.mark.parametrize("loaded", ["", "a", "b"])
def test_two_models_asked_at_the_same_time_are_served_one_after_the_other(loaded: str, first_at_the_place: str) -> None:
    a, b = Model("a"), Model("b")
    cluster = Cluster(*((a, b) if first_at_the_place == "a" else (b, a)))
    if loaded:
        cluster.ask(a if loaded == "a" else b)
        cluster.run(60)
    cluster.ask(a, b)
    cluster.run(2 * (LOAD_S + REQUEST_S) + 10)
    assert [a.calls, b.calls] == [[], []]
    assert a.starts + b.starts == 2, "each loads once, and a model that is loaded has its turn first"


@pytest.mark.parametrize("first_at_the_place", ["a", "b"])
def test_models_that_always_have_work_get_turns_of_bounded_length(first_at_the_place: str) -> None:
    a, b = Model("a"), Model("b")
    cluster = Cluster(*((a, b) if first_at_the_place == "a" else (b, a)))
    for _ in range(60):
        cluster.ask(a, b)
        cluster.run(10)
    assert [a.starts, b.starts] == [4, 4], "a load of 20 s and a minute each"
    shares = [each.done for each in (a, b)]
    assert min(shares) >= 0.6 * max(shares)
    assert sum(shares) * REQUEST_S >= 0.6 * 600, "most of the time is work"


def test_three_models_at_two_places_all_get_turns() -> None:
    models = [Model(name) for name in "abc"]
    cluster = Cluster(*models, places=2)
    for _ in range(60):
        cluster.ask(*models)
        cluster.run(10)
    shares = [each.done for each in models]
    assert min(shares) >= 0.5 * max(shares)


def test_a_model_that_never_comes_up_lets_the_other_have_its_turn() -> None:
    broken, sound = Model("a", load_s=math.inf), Model("b")
    cluster = Cluster(sound, broken)
    cluster.ask(broken)
    cluster.run(5)
    cluster.ask(sound)
    for _ in range(35):
        broken.ready_s = None  # its start fails, and Serve tries again
        cluster.run(20)
    assert sound.done == 1
    assert broken.starts > 20


def test_a_model_whose_load_is_longer_than_any_turn_is_loaded_nevertheless() -> None:
    slow, quick = Model("a", load_s=700), Model("b")
    cluster = Cluster(slow, quick)
    cluster.ask(slow)
    for _ in range(78):
        cluster.ask(quick)
        cluster.run(10)
    assert [slow.done, slow.starts] == [1, 1]
    assert quick.done > 0


def test_a_replica_of_a_deploy_that_found_the_place_first_keeps_it_for_its_turn() -> None:
    a, b = Model("a", target=1), Model("b", target=1)
    cluster = Cluster(b, a)  # both load at a deploy; the turn is of the first by name, the place of the other
    cluster.ask(a, b)
    cluster.run(2 * (LOAD_S + REQUEST_S) + 10)
    assert [a.calls, b.calls] == [[], []]
    assert [a.starts, b.starts] == [1, 1]
