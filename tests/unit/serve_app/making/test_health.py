"""The health of the stages is told in time, whoever does not answer."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve_app.making import health
from serve_app.making.health import NO_ANSWER, UNKNOWN, read_health
from serve_app.making.sleep.deployment_states import DeploymentStates, State
from serve_app.making.sleep.model_sleep import ModelSleep
from serve_app.making.stages import Stages
from tests.support.played_stages import Method


class Silent:
    deployment_name, app_name = "Silent", "app"

    def __init__(self) -> None:
        self.describe = Method(self._describe)

    async def _describe(self) -> None:
        raise TimeoutError


async def test_a_controller_that_never_answers_does_not_hold_up_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()
    thread = ThreadPoolExecutor(1)
    monkeypatch.setattr(health, "CONTROLLER_THREAD", thread)
    monkeypatch.setattr(health, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(health, "deployment_states", lambda _: stopped.wait(30))
    silent: Any = Silent()
    for _ in range(3):
        answer = await read_health({"m": Stages(silent, silent, silent)})
        assert (answer["status"], answer["missing"]) == ("loading", ["Silent"])
        assert answer["stages"]["Silent"]["detail"] == NO_ANSWER
    stopped.set()
    thread.shutdown()


async def test_a_stage_whose_replicas_are_busy_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "deployment_states", lambda _: {"Silent": "running"})
    silent: Any = Silent()
    assert (await read_health({"m": Stages(silent, silent, silent)}))["status"] == "ok"


async def test_a_stage_that_went_to_sleep_while_it_was_asked_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "deployment_states", lambda _: {"Silent": "asleep"})
    silent: Any = Silent()
    answer = await read_health({"m": Stages(silent, silent, silent)})
    assert (answer["status"], answer["missing"]) == ("ok", [])


@pytest.mark.parametrize("told", [{}, {"Silent": "starting"}], ids=["nobody knows", "it starts"])
async def test_an_application_is_not_healthy_before_it_is_known_what_runs(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, State]
) -> None:
    monkeypatch.setattr(health, "deployment_states", lambda _: told)
    monkeypatch.setattr(health, "told_start", lambda *_: None)
    silent: Any = Silent()
    stages = Stages(silent, silent, silent)
    stages.sleep = ModelSleep(stages.deployments(), DeploymentStates("app", lambda _: told))
    answer = await read_health({"m": stages})
    assert (answer["status"], answer["missing"]) == ("loading", ["Silent"])
    assert answer["models"] == {"m": "loading"}
    assert answer["stages"]["Silent"] == {"ready": False, "detail": NO_ANSWER if told else UNKNOWN}


async def test_a_stage_that_starts_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {("app", "Silent"): "warming up, request 1 of 2: step 3 of 28"}
    monkeypatch.setattr(health, "deployment_states", lambda _: {})
    monkeypatch.setattr(health, "told_start", lambda *asked: told.get(asked))
    silent: Any = Silent()
    answer = await read_health({"m": Stages(silent, silent, silent)})
    assert answer["stages"]["Silent"] == {"ready": False, "detail": "warming up, request 1 of 2: step 3 of 28"}
    told.clear()
    assert (await read_health({"m": Stages(silent, silent, silent)}))["stages"]["Silent"]["detail"] == NO_ANSWER


async def test_a_model_whose_replicas_fail_to_start_is_named_and_the_others_are_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, bad = Silent(), Silent()
    good.deployment_name, bad.deployment_name = "Pipeline-flux", "Pipeline-wan"
    monkeypatch.setattr(health, "deployment_states", lambda _: {"Pipeline-flux": "running", "Pipeline-wan": "failed"})
    monkeypatch.setattr(health, "told_start", lambda *_: None)
    models: Any = {"flux": (good,) * 3, "wan": (bad,) * 3}
    answer = await read_health({name: Stages(*handles) for name, handles in models.items()})
    assert (answer["status"], answer["missing"]) == ("loading", ["Pipeline-wan"])
    assert answer["models"] == {"flux": "ready", "wan": "loading"}
    assert answer["stages"]["Pipeline-wan"]["detail"] == health.FAILED
