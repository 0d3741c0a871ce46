"""A request ends when the actor that asked for it is gone, and only then."""

from __future__ import annotations

import asyncio

import pytest

from deployments.replicas.owner_watch import OwnerWatch

EVERY_S = 0.01


class Looks:
    """What Ray says at each look; the last is repeated."""

    def __init__(self, *looks: set[str] | Exception) -> None:
        self.looks = list(looks)
        self.count = 0

    def __call__(self) -> set[str]:
        look = self.looks[min(self.count, len(self.looks) - 1)]
        self.count += 1
        if isinstance(look, Exception):
            raise look
        return look


async def is_ended(looks: Looks, owner: str = "ingress") -> bool:
    """Whether the request has ended when Ray was asked often enough."""
    watch = OwnerWatch(looks, EVERY_S)

    async def work() -> None:
        with watch.bound_to(owner):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    for _ in range(500):
        if task.done() or looks.count >= len(looks.looks) + 5:
            break
        await asyncio.sleep(EVERY_S)
    ended = task.cancelled()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return ended


ALIVE, GONE = {"ingress", "other"}, {"other"}


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ((ALIVE,), False),
        ((ALIVE, GONE, GONE), True),
        ((ALIVE, GONE, ALIVE, GONE, ALIVE), False),
        ((GONE,), False),  # never seen: it may be invisible from here
        ((ALIVE, ConnectionError(), ConnectionError(), ConnectionError()), False),
        ((ALIVE, GONE, ConnectionError(), GONE), True),
    ],
)
async def test_two_looks_in_a_row_that_miss_a_known_owner_end_its_request(
    looks: tuple[set[str] | Exception, ...], expected: bool
) -> None:
    assert await is_ended(Looks(*looks)) == expected


async def test_a_request_without_an_owner_is_not_watched() -> None:
    looks = Looks(GONE)
    watch = OwnerWatch(looks, EVERY_S)
    with watch.bound_to(""):
        await asyncio.sleep(5 * EVERY_S)
    assert looks.count == 0


async def test_nothing_is_asked_when_no_request_is_there() -> None:
    looks = Looks(ALIVE)
    watch = OwnerWatch(looks, EVERY_S)
    with watch.bound_to("ingress"):
        await asyncio.sleep(5 * EVERY_S)
    assert looks.count > 0
    await asyncio.sleep(3 * EVERY_S)
    asked = looks.count
    await asyncio.sleep(5 * EVERY_S)
    assert looks.count == asked
