"""Ray Serve routes a request to a replica that holds its LoRAs, unless that one has more to do than another."""

from __future__ import annotations

import time

import httpx
import pytest

from tests.support.served_application import FORKS, ServedApplication

pytestmark = pytest.mark.timeout(600)  # the first test starts Ray

APPLICATION = {
    "name": "routed",
    "route_prefix": "/routed",
    "import_path": "tests.support.routed_app:build_app",
    "runtime_env": FORKS,
    "args": {},
}
TIMES = 6


def ask(served: ServedApplication, path: str, **query: str | int) -> list[str]:
    answer = httpx.get(f"{served.url}/routed/{path}", params=query, timeout=60)
    ids: list[str] = answer.raise_for_status().json()
    return ids


def test_holders_are_preferred_and_busy_ones_are_not_waited_for(served: ServedApplication) -> None:
    with served.beside(APPLICATION):
        served.wait_until_healthy("/routed")
        give_up = time.monotonic() + 60
        replicas: list[str] = []
        while len(replicas) < 2:  # both have started
            replicas = ask(served, "health")
            assert time.monotonic() < give_up
        # Serve asks the replicas every two seconds what they hold.
        while [ask(served, "taken", digest=id, times=TIMES) for id in replicas] != [[id] * TIMES for id in replicas]:
            assert time.monotonic() < give_up
        first, second = replicas
        assert ask(served, "taken_beside", digest=first) == [first, second]
