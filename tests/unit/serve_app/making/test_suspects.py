"""Replicas of the denoiser die under many requests: the innocent get their pictures, the poisonous one ends alone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.errors import GenerationFailedError
from deployments.messages import (
    Checkpoint,
    DecodeInputs,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    Media,
    MediaFile,
    OutputFormat,
    Packed,
    PayloadFollows,
)
from deployments.replicas.fitness import Fitness
from serve_app.making import generate as generate_module
from serve_app.making.follower import Follower
from serve_app.making.generate import generate
from serve_app.making.stages import Stages
from serve_app.making.suspects import MAX_DEATHS_ALONE
from tests.support.played_stages import Method, Reference, Stream

STEPS = 6
INPUTS = DecodeInputs("result", Packed(None))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(generate_module, "LONGEST_PAUSE_S", 0.004)


class Replica:
    """A process of the denoiser: all that is in it dies with it."""

    def __init__(self) -> None:
        self.death = asyncio.Event()
        self.fitness = Fitness(lambda: None, ())
        self.present: list[str] = []
        self.suspects: list[str] = []


class Denoiser:
    """Its one replica is replaced when it dies; what is poisonous kills it at step 3."""

    def __init__(self, poisonous: set[str] = frozenset(), at_step: int = 3) -> None:  # type: ignore[assignment]
        self.poisonous, self.at_step = poisonous, at_step
        self.replica = Replica()
        self.deaths: list[list[str]] = []  # who was in the replica
        self.suspects_at_deaths: list[list[str]] = []
        self.begins: asyncio.Queue[str] = asyncio.Queue()
        self.denoise = Method(lambda *call: Stream(self._items(*call)))
        self.encode = Method(lambda *_: Reference("conditioning"))
        self.decode = Method(lambda request, *_: Reference(Media((MediaFile(request.request_id.encode()),))))

    def options(self, **_: Any) -> Denoiser:
        return self

    def kill(self) -> None:
        dead, self.replica = self.replica, Replica()
        self.deaths.append(dead.present)
        self.suspects_at_deaths.append(dead.suspects)
        dead.death.set()

    async def _items(
        self, request: GenerationRequest, envelope: Envelope, _: Any, checkpoint: Checkpoint | None
    ) -> AsyncIterator[Any]:
        replica, name = self.replica, request.request_id
        async with replica.fitness.work(envelope) as trial:
            self.begins.put_nowait(name)
            replica.present.append(name)
            if envelope.tried_until is not None:
                replica.suspects.append(name)
            for step in range(1 + (checkpoint.step if checkpoint else 0), STEPS + 1):
                if name in self.poisonous and step == self.at_step and not replica.death.is_set():
                    self.kill()
                for _ in range(3):
                    await asyncio.sleep(0)
                if replica.death.is_set():
                    raise RayActorError
                if envelope.report_progress:
                    yield DenoisingProgress(step, STEPS)
                trial.reached(step)
                if envelope.tried_until is not None and step == envelope.tried_until:
                    replica.suspects.remove(name)
                if step % 2 == 0:
                    yield PayloadFollows("checkpoint", step)
                    yield Checkpoint(name, step, "fingerprint", "digest", Packed(None))
            replica.present.remove(name)
        yield PayloadFollows("decode_inputs", STEPS)
        yield INPUTS


def requests(*names: str) -> list[GenerationRequest]:
    return [GenerationRequest(name, "model", {}, 0, OutputFormat("image", "png")) for name in names]


def ingresses(denoiser: Any, number: int = 1) -> list[Stages]:
    return [Stages(denoiser, denoiser, denoiser) for _ in range(number)]


async def make_all(stages: list[Stages], names: list[str], follower: Follower | None = None) -> dict[str, Any]:
    """The outcome of each request by its name; they come in through the ingresses in turn."""
    made = [
        generate(stages[index % len(stages)], request, follower or Follower())
        for index, request in enumerate(requests(*names))
    ]
    outcomes = await asyncio.wait_for(asyncio.gather(*made, return_exceptions=True), 20)
    return dict(zip(names, outcomes, strict=True))


def pictures(outcomes: dict[str, Any]) -> set[str]:
    return {name for name, made in outcomes.items() if isinstance(made, Media) and made.files[0].data == name.encode()}


INNOCENT = [f"innocent {number}" for number in range(8)]


class Wants(Follower):
    wants_progress = True


@pytest.mark.parametrize("num_ingresses", [1, 2, 3])
@pytest.mark.parametrize("follower", [Follower(), Wants()], ids=["silent", "with progress"])
async def test_poison_ends_alone_among_eight_that_get_their_pictures(num_ingresses: int, follower: Follower) -> None:
    denoiser = Denoiser({"poison"})
    outcomes = await make_all(ingresses(denoiser, num_ingresses), ["poison", *INNOCENT], follower)
    assert pictures(outcomes) == set(INNOCENT)
    assert isinstance(outcomes["poison"], GenerationFailedError)
    assert f"{MAX_DEATHS_ALONE} times while it was tried alone" in str(outcomes["poison"])
    assert denoiser.suspects_at_deaths[-1] == ["poison"]


@pytest.mark.parametrize("num_ingresses", [1, 2])
async def test_two_that_are_poisonous_end_and_nobody_else(num_ingresses: int) -> None:
    denoiser = Denoiser({"poison", "another poison"})
    names = ["poison", *INNOCENT[:4], "another poison", *INNOCENT[4:]]
    outcomes = await make_all(ingresses(denoiser, num_ingresses), names)
    assert pictures(outcomes) == set(INNOCENT)


async def test_poison_is_found_wherever_in_the_denoising_it_kills() -> None:
    for at_step in range(1, STEPS + 1):
        denoiser = Denoiser({"poison"}, at_step)
        outcomes = await make_all(ingresses(denoiser), ["poison", *INNOCENT])
        assert pictures(outcomes) == set(INNOCENT)
        assert len(denoiser.deaths) <= 2 + MAX_DEATHS_ALONE


@pytest.mark.parametrize("num_deaths", [1, 3, 6])
async def test_quick_deaths_that_nobody_is_to_blame_for_cost_no_request(num_deaths: int) -> None:
    denoiser = Denoiser()

    async def kill() -> None:
        for _ in range(num_deaths):
            while await denoiser.begins.get() not in denoiser.replica.present:
                continue
            denoiser.kill()

    killing = asyncio.create_task(kill())
    outcomes = await make_all(ingresses(denoiser), INNOCENT)
    await killing
    assert pictures(outcomes) == set(INNOCENT)
    assert len(denoiser.deaths) == num_deaths


async def test_suspects_are_in_the_stage_one_at_a_time() -> None:
    denoiser = Denoiser({"poison"})
    await make_all(ingresses(denoiser, 2), ["poison", *INNOCENT])
    assert all(len(suspects) <= 1 for suspects in denoiser.suspects_at_deaths)


async def test_others_do_not_wait_while_a_suspect_is_tried() -> None:
    denoiser = Denoiser()
    [stages] = ingresses(denoiser)
    held = stages.suspects.new_request()
    held.died((1, 0))
    await held.wait_for_turn()
    assert pictures(await make_all([stages], INNOCENT)) == set(INNOCENT)


async def test_a_suspect_that_is_cancelled_gives_its_turn_away() -> None:
    denoiser = Denoiser({"poison"})
    [stages] = ingresses(denoiser)
    [poison, *_] = requests("poison")
    task = asyncio.create_task(generate(stages, poison))
    for _ in range(2):
        await denoiser.begins.get()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    after = stages.suspects.new_request()
    after.died((0, 0))
    await asyncio.wait_for(after.wait_for_turn(), 5)


def test_an_envelope_that_crosses_versions_needs_no_suspicion() -> None:
    assert dataclasses.replace(Envelope(), report_progress=True).tried_until is None
