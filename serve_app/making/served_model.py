"""The model that is served, as the ingress knows it: its name, and what its stages say of it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.errors import OtherVersionError, StageUnavailableError, TriptychError
from deployments.messages import ArgumentDescription, Effects, GenerationRequest, StageDescription
from serve_app.making.health import describe_stages
from serve_app.making.sleep.model_sleep import FRESH_S, RESTING
from serve_app.making.stages import Stages

ARGUMENTS_TIMEOUT_S = 60.0
USUAL_LEVEL = "auto"


@dataclass
class ServedModel:
    """Describes itself when it is first asked: a replica of the ingress is ready before those of the stages."""

    name: str
    stages: Stages
    default_arguments: dict[str, Any] = field(default_factory=dict)  # below those of a level of `quality`
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)  # arguments by level
    aliases: tuple[str, ...] = ()  # more names that callers may use
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time in seconds
    _description: StageDescription | None = field(default=None, init=False)
    _described_at_waking: StageDescription | None = field(default=None, init=False)
    _heard_at: int = field(default=-1, init=False)  # the loads that were seen when it described itself
    _arguments: asyncio.Task[list[ArgumentDescription]] | None = field(default=None, init=False)

    async def describe(self) -> StageDescription:
        """What it said last, which a model that sleeps is not asked again.

        Raises StageUnavailableError while the encoder cannot answer, and while a model sleeps that was never asked.
        """
        latest = self.stages.sleep.described
        if latest is not None and latest is not self._described_at_waking:
            self._described_at_waking = latest
            self._take(latest)
        return self._description or self._take(await self._hear())

    async def describe_again(self) -> StageDescription:
        """What its stages say now, past what is kept here.

        Raises OtherVersionError while a replica of another version is there, which may take other things, and
        StageUnavailableError while the encoder cannot answer. A model that sleeps and is not known is woken.
        """
        sleep = self.stages.sleep
        if await sleep.state(FRESH_S) in RESTING:
            known = (await sleep.facts(again=True)).description
            if known is not None and known.version == self.stages.version:
                return known
            await sleep.wake()
            raise StageUnavailableError(sleep.words())
        answers = await describe_stages(self.stages)
        described = {name: each.of(self.name) for name, each in answers.items() if not isinstance(each, str)}
        if any(each.version != self.stages.version for each in described.values()):
            raise OtherVersionError(f"the model {self.name!r} is being updated")
        encoder = self.stages.encoder.deployment_name
        if encoder not in described:
            raise StageUnavailableError(f"the model is not ready: {answers[encoder]}")
        return self._take(described[encoder])

    def _take(self, heard: StageDescription) -> StageDescription:
        """Keeps what a replica of this version said; what one of before an update said, or of after it, is not kept."""
        if heard.version == self.stages.version:
            self._description = heard
        return heard

    async def _hear(self) -> StageDescription:
        sleep = self.stages.sleep
        if await sleep.state(FRESH_S) in RESTING:
            known = self._description or (await sleep.facts()).description
            if known is None:
                raise StageUnavailableError(f"{sleep.words()}; what it takes is not known before")
            return known
        loads = sleep.loads
        answers = await describe_stages(self.stages)
        answer = answers[self.stages.encoder.deployment_name]
        if isinstance(answer, str):
            if self._description is not None:
                return self._description
            raise StageUnavailableError(f"the model is not ready: {answer}")
        answer = answer.of(self.name)
        if answer.version != self.stages.version:
            return answer
        self._heard_at = loads
        load_s = (await sleep.facts()).load_s or _longest_start_s(answers.values())
        await sleep.keep(description=answer, load_s=load_s)
        return answer

    async def wake_if_unknown(self) -> None:
        """Wakes a model that sleeps and has never said what it takes: no request is known to be valid before.

        Raises ModelLoadingError for such a model.
        """
        sleep = self.stages.sleep
        if self._description is not None or not await sleep.is_resting():
            return
        known = (await sleep.facts()).description
        if known is None or known.version != self.stages.version:  # it may take other things than before an update
            await sleep.wake()
            raise sleep.refusal()

    async def tell(self) -> None:
        """What is known of its sleep, to the meter; a model that is awake says meanwhile what it takes."""
        stages = self.stages
        state = await stages.sleep.state(FRESH_S)
        resting = await stages.sleep.resting_deployments()
        stages.meter.set("triptych_model_asleep", float(state in RESTING), model=self.name)
        for name in stages.deployments():
            stages.meter.set("triptych_stages_wanted", float(name not in resting), target=name)
        # It may be another one than before.
        if state == "ready" and not resting and self._heard_at != stages.sleep.loads:
            with contextlib.suppress(TriptychError, RayError, RayServeException):
                self._take(await self._hear())
        if (load_s := (await stages.sleep.facts()).load_s) is not None:
            stages.meter.set("triptych_model_load_seconds", load_s, model=self.name)

    async def effects(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        """What the request's arguments do; raises what a lost replica raises, and StageUnavailableError while it
        sleeps."""
        if await self.stages.sleep.is_resting():
            raise StageUnavailableError("the model is asleep")
        answer: Effects = await self.stages.encoder.effects.remote(request, asked)
        return answer

    async def arguments(self, names: tuple[str, ...]) -> list[ArgumentDescription] | None:
        """Those that the checkpoint reads, learned when they are first asked for; None: not known yet."""
        if self._arguments is None and await self.stages.sleep.is_resting():
            kept = (await self.stages.sleep.facts()).arguments
            return None if kept is None else list(kept)
        if self._arguments is None:
            # An empty context: it does not end with the HTTP request that began it.
            context = contextvars.Context()
            self._arguments = asyncio.get_running_loop().create_task(self._ask_arguments(names), context=context)
        try:
            return await asyncio.wait_for(asyncio.shield(self._arguments), ARGUMENTS_TIMEOUT_S)
        except TimeoutError:
            return None
        except (RayError, RayServeException):
            self._arguments = None
            return None

    async def _ask_arguments(self, names: tuple[str, ...]) -> list[ArgumentDescription]:
        ask = self.stages.encoder.arguments
        answer: list[ArgumentDescription] = await ask.remote(names, self.usual_arguments, self.name)
        await self.stages.sleep.keep(arguments=tuple(answer))
        return answer

    @property
    def usual_arguments(self) -> dict[str, Any]:
        """Of a request that names none: where there is a level `auto`, it is that of requests without `quality`."""
        return self.default_arguments | self.quality.get(USUAL_LEVEL, {})

    @property
    def configured_arguments(self) -> tuple[dict[str, Any], ...]:
        """Those that no request needs to name: the defaults, and those of each level of quality."""
        return self.default_arguments, *self.quality.values()

    @property
    def names(self) -> tuple[str, ...]:
        """All that callers may use, the first its own."""
        return self.name, *self.aliases


def _longest_start_s(answers: Iterable[StageDescription | str]) -> float | None:
    """Of the stages, as their replicas measured it: until a load of all of them was measured, the best guess."""
    return max((each.start_s for each in answers if not isinstance(each, str) and each.start_s), default=None)
