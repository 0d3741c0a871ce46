"""Requests for the same work: made once for all who wait, ended with the last of them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from deployments.errors import GenerationFailedError
from deployments.messages import DenoisingProgress, GenerationRequest, Media, MediaFile, OutputFormat
from serve_app.making.layers.sharing import SharedGenerations

REQUEST = GenerationRequest("a", "flux", {"prompt": "a cat"}, 7, OutputFormat("image", "png"))


class Stages:
    """Generations that wait until they are let go."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.cancelled: list[str] = []
        self.go = asyncio.Event()
        self.failure: Exception | None = None
        self.hooks: list[tuple[Any, Any]] = []

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: Any = None,
        on_checkpoint: Any = None,
        resume_from: Any = None,
        on_preview: Any = None,
    ) -> Media:
        self.began.append(request.request_id)
        self.hooks.append((on_progress, on_checkpoint))
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        if self.failure:
            raise self.failure
        if on_progress is not None:
            on_progress(DenoisingProgress(1, 2))
            on_checkpoint("reference", 1)
        return Media((MediaFile(request.request_id.encode()),))


def named(name: str, **changes: Any) -> GenerationRequest:
    return dataclasses.replace(REQUEST, request_id=name, **changes)


async def start(shared: SharedGenerations, *requests: GenerationRequest, **hooks: Any) -> list[asyncio.Task[Media]]:
    tasks = [asyncio.create_task(shared.generate(request, **hooks)) for request in requests]
    await asyncio.sleep(0.01)
    return tasks


@pytest.fixture
def stages() -> Stages:
    return Stages()


@pytest.fixture
def shared(stages: Stages) -> SharedGenerations:
    return SharedGenerations(stages.generate)


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
        {"cache_dit": {"enable": True}},
    ],
)
async def test_other_work_is_not_shared(stages: Stages, shared: SharedGenerations, changes: dict[str, Any]) -> None:
    tasks = await start(shared, named("a"), named("b", **changes))
    stages.go.set()
    await asyncio.gather(*tasks)
    assert stages.began == ["a", "b"]


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
    heard: list[Any] = []
    hooks = {"on_progress": heard.append, "on_checkpoint": lambda reference, step: heard.append((reference, step))}
    tasks = await start(shared, named("a"), named("b"), **hooks)
    stages.go.set()
    await asyncio.gather(*tasks)
    assert heard == [DenoisingProgress(1, 2)] * 2 + [("reference", 1)] * 2


async def test_a_generation_that_reports_nothing_does_not_serve_those_who_follow(
    stages: Stages, shared: SharedGenerations
) -> None:
    tasks = await start(shared, named("a"))
    tasks += await start(shared, named("b"), on_progress=lambda _: None, on_checkpoint=lambda *_: None)
    tasks += await start(shared, named("c"))
    stages.go.set()
    await asyncio.gather(*tasks)
    assert stages.began == ["a", "b"]
    assert stages.hooks[0] == (None, None)
