"""Which models give their replicas back and when they get them again, with the policy called as Serve calls it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.autoscaling_policy import _apply_app_level_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.autoscaling import ReplicaRatio, sleep
from serve_app.making.sleep.kept_facts import USED

STAGE = {"Encoder": "encoder", "Denoiser": "denoiser", "VAE": "vae"}
LOOK_BACK_S = 30.0


@dataclass
class Deployment:
    """As Serve's controller keeps it; replicas that are started run at once, unless `is_stuck`."""

    name: str
    least: int = 0
    most: int = 4
    target: int = 0
    running: int = 0
    queued: float = 0.0  # at callers, the mean of the look-back period
    ongoing: float = 0.0  # in replicas, as Serve counts them
    came: float = 0.0  # requests since the start of the replica
    present: float = 0.0
    is_stuck: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    series: list[tuple[float, float]] = field(default_factory=list)  # time, requests that had come

    def context(self, now: float) -> AutoscalingContext:
        stage = STAGE[self.name.partition("-")[0]]
        told = {"arrived": self.series, "present": [(now, self.present)], "refused": [(now, 0.0)]}
        raw = {
            f"{stage}_{name}": {"replica": [TimeStampedValue(at, value) for at, value in values]}
            if self.running
            else {}
            for name, values in told.items()
        }
        given: dict[str, Any] = {
            "deployment_id": None, "deployment_name": self.name, "app_name": None,
            "current_num_replicas": self.running, "target_num_replicas": self.target, "running_replicas": [],
            "total_num_requests": self.queued + self.ongoing, "total_queued_requests": self.queued,
            "aggregated_metrics": None, "raw_metrics": raw,
            "capacity_adjusted_min_replicas": self.least, "capacity_adjusted_max_replicas": self.most,
            "policy_state": self.state, "last_scale_up_time": None, "last_scale_down_time": None, "current_time": now,
            "config": AutoscalingConfig(
                min_replicas=self.least, max_replicas=self.most, look_back_period_s=LOOK_BACK_S,
                upscale_delay_s=0, downscale_delay_s=0,
            ),
        }  # fmt: skip
        return AutoscalingContext(**given)


class Controller:
    """Calls the policy every few seconds, through the wrapper that Serve puts around it."""

    def __init__(self, *deployments: Deployment, **settings: Any) -> None:
        self.deployments = {each.name: each for each in deployments}
        self.policy = _apply_app_level_autoscaling_config(ReplicaRatio(**settings))  # type: ignore[arg-type]
        self.now = 1000.0

    def tick(self, seconds: float = 0.1) -> dict[str, int]:
        self.now += seconds
        for each in self.deployments.values():
            each.series = [*(pair for pair in each.series if pair[0] > self.now - LOOK_BACK_S), (self.now, each.came)]
        decided, states = self.policy({name: each.context(self.now) for name, each in self.deployments.items()})  # type: ignore[arg-type]
        for name, each in self.deployments.items():
            each.state, each.target = states[name], decided.get(name, each.target)
            each.running = min(each.target, each.running) if each.is_stuck else each.target
            if not each.running:
                each.came, each.series = 0.0, []
        return self.targets()

    def run(self, seconds: float, step_s: float = 5.0) -> dict[str, int]:
        for _ in range(round(seconds / step_s)):
            self.tick(step_s)
        return self.tick()

    def targets(self) -> dict[str, int]:
        return {name: each.target for name, each in self.deployments.items()}

    def __getitem__(self, name: str) -> Deployment:
        return self.deployments[name]


def model(name: str = "", replicas: int = 1, least: int = 0) -> list[Deployment]:
    after = f"-{name}" if name else ""
    return [Deployment(f"{each}{after}", least, target=replicas, running=replicas) for each in STAGE]


def every(count: int, *names: str) -> dict[str, int]:
    return {f"{each}{name}": count for name in names or ("",) for each in STAGE}


def test_a_model_without_requests_gives_all_its_replicas_back_at_once_after_its_time() -> None:
    controller = Controller(*model(), idle_s=60)
    assert controller.run(55) == every(1)
    assert controller.run(10) == every(0)
    assert controller.run(3600) == every(0)


def test_idle_s_goes_before_cooldown_s_in_both_directions() -> None:
    assert Controller(*model(replicas=3), idle_s=20, cooldown_s=600).run(30) == every(0)
    patient = Controller(*model(replicas=3), idle_s=600, cooldown_s=20)
    assert patient.run(60) == every(1)
    assert patient.run(600) == every(0)


def test_a_request_that_waits_at_any_stage_wakes_all_of_them_together() -> None:
    for stage in STAGE:
        controller = Controller(*model(replicas=0), idle_s=60)
        assert controller.run(300) == every(0)
        controller[stage].queued = 1
        assert controller.tick() == every(1)


def test_ten_waiting_requests_load_one_replica_of_each_stage() -> None:
    controller = Controller(*model(replicas=0), idle_s=60)
    controller.tick()
    for each in controller.deployments.values():
        each.is_stuck = True  # it loads
    controller["Encoder"].queued = 10
    assert [controller.tick(), controller.run(30)] == [every(1), every(1)]


def test_requests_that_came_and_went_between_two_looks_keep_it_awake() -> None:
    controller = Controller(*model(), idle_s=60)
    for _ in range(10):
        controller["Encoder"].came += 1
        assert controller.run(45) == every(1)
    assert controller.run(20) == every(0)


def test_what_is_in_work_or_loads_keeps_it_awake_however_long_it_takes() -> None:
    working = Controller(*model(), idle_s=60)
    working["VAE"].present = 1
    assert working.run(3600) == every(1)
    loading = Controller(*model(), idle_s=60)
    loading["Denoiser"].running, loading["Denoiser"].is_stuck = 0, True
    assert loading.run(3600) == every(1)


def test_a_request_that_an_ingress_has_and_no_replica_reported_yet_keeps_it_awake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(*model(), idle_s=60)
    told = {"Encoder": -math.inf}
    monkeypatch.setattr(sleep, "used_at", lambda context: told.get(context.deployment_name, -math.inf))
    controller.run(55)
    told["Encoder"] = controller.now
    assert controller.run(50) == every(1)
    assert controller.run(30) == every(0)


def test_a_call_in_work_that_serve_knows_of_keeps_it_awake() -> None:
    controller = Controller(*model(), idle_s=60)
    controller["Encoder"].ongoing = 0.2
    assert controller.run(600) == every(1)


def test_ingress_and_policy_mean_the_same_place_in_rays_store() -> None:
    assert sleep.USED == USED


def test_a_model_that_was_deployed_asleep_stays_asleep() -> None:
    assert Controller(*model(replicas=0), idle_s=60).tick() == every(0)


def test_each_model_sleeps_on_its_own() -> None:
    controller = Controller(*model("flux"), *model("wan"), idle_s={"flux": 600, "wan": 60})
    assert controller.run(120) == every(1, "-flux") | every(0, "-wan")
    controller["Denoiser-wan"].queued = 1
    controller["Encoder-flux"].came += 1
    assert controller.tick() == every(1, "-flux", "-wan")


def test_a_model_that_a_mapping_does_not_name_has_the_default() -> None:
    controller = Controller(*model("flux"), *model("wan"), idle_s={"wan": 60})
    assert controller.run(300) == every(1, "-flux") | every(0, "-wan")
    assert controller.run(400) == every(0, "-flux", "-wan")


def test_deployments_with_min_replicas_stay_when_the_others_of_their_model_go() -> None:
    stages = model()
    stages[0].least = 1
    assert Controller(*stages, idle_s=60).run(120) == every(0) | {"Encoder": 1}


def test_without_min_replicas_0_nothing_sleeps() -> None:
    assert Controller(*model(least=1), idle_s=60).run(3600) == every(1)


def test_what_models_share_stays_while_one_of_them_works_and_goes_with_the_last() -> None:
    shared = Deployment("Encoder-flux+wan", target=1, running=1)
    controller = Controller(*model("flux"), *model("wan"), shared, idle_s={"flux": 60, "wan": 40})
    controller["Denoiser-flux"].present = 1
    assert controller.run(120) == every(1, "-flux") | every(0, "-wan") | {"Encoder-flux+wan": 1}
    controller["Denoiser-flux"].present = 0
    assert controller.run(120) == every(0, "-flux") | every(0, "-wan") | {"Encoder-flux+wan": 0}


def test_an_awake_model_without_a_request_gives_way_where_another_needs_more() -> None:
    controller = Controller(*model("flux"), *model("wan"), idle_s=3600, accelerators=6, cooldown_s=0)
    controller.run(60)
    for name in ("Encoder", "Denoiser", "VAE"):
        controller[f"{name}-flux"].queued = 8
    controller.run(60)
    assert {name: count for name, count in controller.targets().items() if name.endswith("wan")} == every(0, "-wan")


# --- two models and one place ---


def test_where_there_is_no_room_for_two_the_idle_one_goes_before_its_time() -> None:
    controller = Controller(*model("flux"), *model("wan", replicas=0), idle_s=3600, accelerators=3)
    assert controller.run(60) == every(1, "-flux") | every(0, "-wan")
    controller["Encoder-wan"].queued = 1
    controller.tick()
    assert controller.tick() == every(0, "-flux") | every(1, "-wan")


def test_one_that_is_at_work_is_not_taken_its_place_and_the_other_begins_when_it_is_done() -> None:
    controller = Controller(*model("flux"), *model("wan", replicas=0), idle_s=3600, accelerators=3)
    controller["Denoiser-flux"].present = 1
    controller["Encoder-wan"].queued, controller["Encoder-wan"].is_stuck = 1, True
    assert controller.run(60) == every(1, "-flux") | every(0, "-wan")
    controller["Denoiser-flux"].present = 0
    controller.run(5)
    assert controller.tick() == every(0, "-flux") | every(1, "-wan")


def test_two_models_that_load_by_halves_do_not_wait_for_each_others_places_for_ever() -> None:
    """The one that was asked first gets what the other holds."""
    controller = Controller(*model("flux", 0), *model("wan", 0), idle_s=3600, accelerators=3)
    controller.tick()
    controller["Encoder-flux"].queued = 1
    controller["VAE-flux"].is_stuck = True
    controller.tick()
    for name in ("Encoder-wan", "VAE-wan"):  # these have got places all the same
        controller[name].target = controller[name].running = 1
    controller["Encoder-wan"].queued, controller["Denoiser-wan"].is_stuck = 1, True
    decided = controller.tick()
    assert decided["VAE-wan"] == 0
    assert {name: count for name, count in decided.items() if name.endswith("flux")} == every(1, "-flux")


@pytest.mark.parametrize(
    ("value", "name"),
    [(0, "idle_s"), (-5, "idle_s"), ("60", "idle_s"), (True, "idle_s"), ({"wan": 0}, "idle_s.wan"), ([60], "idle_s")],
)
def test_an_idle_s_that_is_none_is_refused_by_name(value: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a number above 0"):
        ReplicaRatio(idle_s=value)
