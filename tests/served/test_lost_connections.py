"""Calls whose ingress dies: they are told to repeat, and with a key they find what was begun."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.support.served_application import ServedApplication, error_of

pytestmark = pytest.mark.timeout(600)

BODY: dict[str, Any] = {"prompt": "a small cat", "deterministic": True, "num_inference_steps": 400}
LONG = 1000
PATIENCE_S = 120


def ask(served: ServedApplication, seed: int, key: str | None = None, **changes: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    url = f"{served.url}/v1/images/generations"
    return httpx.post(url, json=BODY | {"seed": seed} | changes, headers=headers, timeout=PATIENCE_S)


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
        plain = callers.submit(ask, served, 1, num_inference_steps=LONG)  # not done before the other is seen to be made
        keyed = callers.submit(ask, served, 2, "dies")
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
