"""Five times as many requests as a served model can make: what is refused, how, and what becomes of the rest."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from benchmarks.open_loop import Timed
from benchmarks.overload import WATCHED, Outcome, Watch, capacity, overload, processes_of
from tests.support.served_application import ServedApplication, picture_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.rest]

BODY = {"size": "32x32", "num_inference_steps": 60}
CONCURRENCY = 8
CAPACITY_S = 4
TIMES = 5
SECONDS = 12
MOST_GROWTH_MB = 100  # of a process; a request that waits holds a few KB


@pytest.fixture(scope="module")
def url(variants: ServedApplication) -> str:
    """The application whose queue is short."""
    return f"{variants.url}/one_stage"


@pytest.fixture(scope="module")
def load(url: str) -> tuple[list[Timed[Outcome]], Watch]:
    return asyncio.run(run_load(url))


async def run_load(url: str) -> tuple[list[Timed[Outcome]], Watch]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        rate = await capacity(http, BODY, CONCURRENCY, CAPACITY_S)
        return await overload(http, BODY, TIMES * rate, SECONDS, processes_of(url))


def test_every_request_gets_its_picture_or_a_429_that_says_when_to_come_back(
    load: tuple[list[Timed[Outcome]], Watch],
) -> None:
    outcomes = [each.answer for each in load[0]]
    refused = [outcome for outcome in outcomes if outcome.status == 429]
    assert {outcome.status for outcome in outcomes} == {200, 429}
    assert all(outcome.pictures == 1 for outcome in outcomes if outcome.status == 200)
    assert all(outcome.says_when_to_come_back for outcome in refused)
    assert {outcome.error_code for outcome in refused} == {"rate_limit_exceeded"}


def test_health_stays_true_and_other_questions_are_answered(load: tuple[list[Timed[Outcome]], Watch]) -> None:
    for path in WATCHED:
        answers = [look.status for look in load[1].looks if look.path == path]
        assert len(answers) >= 3, path
        assert set(answers) == {200}, path


def test_memory_does_not_grow_with_what_is_refused(load: tuple[list[Timed[Outcome]], Watch]) -> None:
    before, *samples = load[1].memory_mb
    assert {"Ingress", "Pipeline", "ProxyActor"} <= before.keys()
    for name, first in before.items():
        assert max(sample[name] for sample in samples) - first < MOST_GROWTH_MB, name


def test_afterwards_it_serves_as_before(load: tuple[list[Timed[Outcome]], Watch], url: str) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "a small cat", "size": "32x32"}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert picture_of(answer.json()["data"][0]).size == (32, 32)
