"""`serve deploy` with other arguments while callers wait: every process is replaced, and no call is lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.support.served_application import ServedApplication

pytestmark = pytest.mark.timeout(900)

BODY: dict[str, Any] = {"prompt": "a small cat", "deterministic": True, "num_inference_steps": 200}
CALLERS = 4
PATIENCE_S = 600


def test_an_update_under_calls_that_wait_answers_them_all_with_the_same_picture(served: ServedApplication) -> None:
    before = replicas_of(served)
    is_over = threading.Event()

    def call_until_over(caller: int) -> list[tuple[int, str]]:
        answers = []
        while not is_over.is_set():
            key = {"Idempotency-Key": f"{caller}-{len(answers)}"} if caller % 2 else {}
            answer = httpx.post(
                f"{served.url}/v1/images/generations", json=BODY | {"seed": caller}, headers=key, timeout=PATIENCE_S
            )
            picture = answer.json()["data"][0]["b64_json"] if answer.status_code == 200 else answer.text
            answers.append((answer.status_code, picture))
        return answers

    with ThreadPoolExecutor() as threads:
        callers = [threads.submit(call_until_over, caller) for caller in range(CALLERS)]
        try:
            [application] = served.config["applications"]
            application["args"]["limits"] = {"max_steps": 1001}  # told to the ingress
            application["args"]["watchdog"] = {"usual_timeout_s": 61}  # told to the stages
            application["deployments"] = [each for each in application["deployments"] if each["name"] != "Ingress"]
            served.deploy()
            give_up = time.monotonic() + PATIENCE_S
            while any(psutil.pid_exists(pid) for pid in before):
                assert time.monotonic() < give_up
                time.sleep(0.5)
        finally:
            is_over.set()
        answers = [caller.result() for caller in callers]
    for answered in answers:
        assert [status for status, _ in answered] == [200] * len(answered)
        assert len({picture for _, picture in answered}) == 1


def replicas_of(served: ServedApplication) -> list[int]:
    titles = [(each.pid, (each.cmdline() or [""])[0]) for each in served.processes()]
    return [pid for pid, title in titles if title.startswith("ray::ServeReplica:triptych:")]
