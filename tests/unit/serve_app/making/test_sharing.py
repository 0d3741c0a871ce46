"""Requests for the same work: made once for all who wait, ended with the last of them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from deployments.errors import GenerationFailedError
from deployments.messages import (
    Checkpoint,
    DenoisingProgress,
    GenerationRequest,
    Media,
    MediaFile,
    OutputFormat,
    Packed,
    RequestWarning,
)
from serve_app.making.follower import NOBODY, Follower
from serve_app.making.layers.sharing import SharedGenerations

REQUEST = GenerationRequest("a", "flux", {"prompt": "a cat"}, 7, OutputFormat("image", "png"))
CUT = RequestWarning("text_cut", "prompt", "it is too long")
CHECKPOINT = Checkpoint("a", 1, "fingerprint", "digest", Packed(None))


class Stages:
    """Generations that wait until they are let go."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.cancelled: list[str] = []
        self.go = asyncio.Event()
        self.failure: Exception | None = None
        self.followers: list[Follower] = []

    async def make(self, request: GenerationRequest, follower: Follower) -> Media:
        self.began.append(request.request_id)
        self.followers.append(follower)
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        if self.failure:
            raise self.failure
        if follower.wants_progress:
            follower.on_progress(DenoisingProgress(1, 2))
            follower.on_checkpoint(CHECKPOINT)
        return Media((MediaFile(request.request_id.encode()),), warnings=(*request.warnings, CUT))


class Hears(Follower):
    """Follows with all that it can ask for."""

    wants_progress = True

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_progress(self, progress: DenoisingProgress) -> None:
        self.heard.append(progress)

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        self.heard.append(checkpoint)


def named(name: str, **changes: Any) -> GenerationRequest:
    return dataclasses.replace(REQUEST, request_id=name, **changes)


async def start(
    shared: SharedGenerations, *requests: GenerationRequest, follower: Follower = NOBODY
) -> list[asyncio.Task[Media]]:
    tasks = [asyncio.create_task(shared.make(request, follower)) for request in requests]
    await asyncio.sleep(0.01)
    return tasks


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
def shared(stages: Stages) -> SharedGenerations:
    return SharedGenerations(stages.make)


async def test_the_same_work_is_done_once_for_all(stages: Stages, shared: SharedGenerations) -> None:
    tasks = await start(shared, named("a"), named("b"), named("c"))
    stages.go.set()
    media = await asyncio.gather(*tasks)
    assert stages.began == ["a"]
    assert media[0] is media[1] is media[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"arguments": {"prompt": "a dog"}},
        {"output": OutputFormat("image", "webp")},
        {"features": {"cache_dit": {"enable": True}}},
    ],
)
async def test_other_work_is_not_shared(stages: Stages, shared: SharedGenerations, changes: dict[str, Any]) -> None:
    tasks = await start(shared, named("a"), named("b", **changes))
    stages.go.set()
    await asyncio.gather(*tasks)
    assert stages.began == ["a", "b"]


async def test_each_is_told_its_own_warnings(stages: Stages, shared: SharedGenerations) -> None:
    style, moment = RequestWarning("no_effect", "style", "x"), RequestWarning("not_checked", "extra_args", "y")
    tasks = await start(shared, named("a", warnings=(style,)), named("b", warnings=(moment,)), named("c"))
    stages.go.set()
    media = await asyncio.gather(*tasks)
    assert stages.began == ["a"]
    assert [each.warnings for each in media] == [(style, CUT), (moment, CUT), (CUT,)]


async def test_work_that_is_over_is_not_shared(stages: Stages, shared: SharedGenerations) -> None:
    stages.go.set()
    await asyncio.gather(*await start(shared, named("a")))
    await asyncio.gather(*await start(shared, named("b")))
    assert stages.began == ["a", "b"]


async def test_it_goes_on_while_one_of_them_waits(stages: Stages, shared: SharedGenerations) -> None:
    first, second = await start(shared, named("a"), named("b"))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    stages.go.set()
    assert (await second).files[0].data == b"a"
    assert stages.cancelled == []


async def test_it_ends_when_the_last_one_leaves(stages: Stages, shared: SharedGenerations) -> None:
    tasks = await start(shared, named("a"), named("b"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert stages.cancelled == ["a"]
    [again] = await start(shared, named("c"))
    stages.go.set()
    assert (await again).files[0].data == b"c"


async def test_all_of_them_hear_of_a_failure(stages: Stages, shared: SharedGenerations) -> None:
    stages.failure = GenerationFailedError("no")
    tasks = await start(shared, named("a"), named("b"))
    stages.go.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [GenerationFailedError] * 2


async def test_steps_and_checkpoints_reach_all_who_follow(stages: Stages, shared: SharedGenerations) -> None:
    anna, berta = Hears(), Hears()
    tasks = [*await start(shared, named("a"), follower=anna), *await start(shared, named("b"), follower=berta)]
    stages.go.set()
    await asyncio.gather(*tasks)
    assert stages.began == ["a"]
    assert anna.heard == berta.heard == [DenoisingProgress(1, 2), CHECKPOINT]


async def test_a_generation_that_reports_nothing_does_not_serve_those_who_follow(
    stages: Stages, shared: SharedGenerations
) -> None:
    tasks = await start(shared, named("a"))
    tasks += await start(shared, named("b"), follower=Hears())
    tasks += await start(shared, named("c"))
    stages.go.set()
    await asyncio.gather(*tasks)
    assert stages.began == ["a", "b"]
    assert [follower.wants_progress for follower in stages.followers] == [False, True]


async def test_a_generation_without_previews_does_not_serve_one_who_wants_some(
    stages: Stages, shared: SharedGenerations
) -> None:
    class Looks(Follower):
        previews = 2

    tasks = [*await start(shared, named("a")), *await start(shared, named("b"), follower=Looks())]
    stages.go.set()
    await asyncio.gather(*tasks)
    assert [follower.previews for follower in stages.followers] == [0, 2]


async def test_a_newcomer_does_not_join_a_generation_that_is_being_cancelled() -> None:
    winding_up = asyncio.Event()

    async def make(request: GenerationRequest, follower: Follower) -> Media:
        try:
            await asyncio.sleep(0.05 if request.request_id == "b" else 60)
        finally:
            if request.request_id == "a":
                winding_up.set()
                await asyncio.sleep(0.1)
        return Media((MediaFile(request.request_id.encode()),))

    shared = SharedGenerations(make)
    [first] = await start(shared, named("a"))
    first.cancel()
    await winding_up.wait()
    [second] = await start(shared, named("b"))
    assert (await second).files[0].data == b"b"
