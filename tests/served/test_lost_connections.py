"""Calls whose ingress goes: killed, a key finds what was begun; replaced, it answers them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.support.served_application import ServedApplication, error_of

pytestmark = pytest.mark.timeout(600)

BODY: dict[str, Any] = {"prompt": "a small cat", "deterministic": True, "num_inference_steps": 150}
PATIENCE_S = 120


def ask(served: ServedApplication, seed: int, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    url = f"{served.url}/v1/images/generations"
    return httpx.post(url, json=BODY | {"seed": seed}, headers=headers, timeout=PATIENCE_S)


def ingress_of(served: ServedApplication) -> psutil.Process:
    """Its title goes on with the method that runs."""
    title = "ray::ServeReplica:triptych:Ingress"
    return next(each for each in served.processes() if each.cmdline() and each.cmdline()[0].startswith(title))


def wait_until_begun(served: ServedApplication) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while True:
        newest = httpx.get(f"{served.url}/v1/jobs", params={"limit": 1}, timeout=PATIENCE_S).json()["data"]
        if newest and newest[0]["status"] == "in_progress" and newest[0]["progress"]:
            return
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_call_whose_ingress_dies_is_told_to_repeat_and_with_a_key_finds_what_was_begun(
    served: ServedApplication,
) -> None:
    with ThreadPoolExecutor() as callers:
        plain, keyed = callers.submit(ask, served, 1), callers.submit(ask, served, 2, "dies")
        wait_until_begun(served)
        ingress_of(served).kill()
        lost = [plain.result(), keyed.result()]
    for answer in lost:
        assert (answer.status_code, error_of(answer)["code"]) == (503, "ingress_lost")
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["x-request-id"]
    again = ask(served, 2, "dies")
    while again.status_code == 503:
        time.sleep(0.2)
        again = ask(served, 2, "dies")
    assert again.json() == ask(served, 2, "dies").json()
    served.wait_until_healthy()
    assert again.json()["data"] == ask(served, 2).json()["data"]  # as without a key


def test_an_ingress_that_is_replaced_answers_the_calls_that_it_has(served: ServedApplication) -> None:
    args = served.config["applications"][0]["args"]
    before = ingress_of(served).pid
    with ThreadPoolExecutor() as callers:
        calls = [callers.submit(ask, served, seed, "replaced" if seed == 3 else None) for seed in (1, 2, 3)]
        wait_until_begun(served)
        args["limits"] = {"max_steps": 1001}
        try:
            file = served.folder / "serve_changed.yaml"
            file.write_text(yaml.safe_dump(served._config()), encoding="utf-8")
            served.cli("deploy", str(file))
        finally:
            args["limits"] = {"max_steps": 1000}
        assert [call.result().status_code for call in calls] == [200] * 3
    give_up = time.monotonic() + PATIENCE_S
    while psutil.pid_exists(before):
        assert time.monotonic() < give_up
        assert ask(served, 4).status_code == 200
