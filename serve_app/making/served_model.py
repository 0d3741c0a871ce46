"""The model that is served, as the ingress knows it: its name, and what its stages say of it."""

from __future__ import annotations

import asyncio
import contextvars
import time
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.errors import StageUnavailableError
from deployments.messages import ArgumentDescription, Effects, GenerationRequest, StageDescription
from serve_app.making.health import describe_stages
from serve_app.making.stages import Stages

ARGUMENTS_TIMEOUT_S = 60.0


@dataclass
class ServedModel:
    """Describes itself when it is first asked: a replica of the ingress is ready before those of the stages."""

    name: str
    stages: Stages
    default_arguments: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)  # arguments by level
    aliases: tuple[str, ...] = ()  # more names that callers may use
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time in seconds
    _description: StageDescription | None = field(default=None, init=False)
    _arguments: asyncio.Task[list[ArgumentDescription]] | None = field(default=None, init=False)

    async def describe(self) -> StageDescription:
        """Raises StageUnavailableError while the encoder cannot answer."""
        if self._description is None:
            answers = await describe_stages(self.stages)
            answer = answers[self.stages.encoder.deployment_name]
            if isinstance(answer, str):
                raise StageUnavailableError(f"the model is not ready: {answer}")
            self._description = answer.of(self.name)
        return self._description

    async def effects(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        """What the request's arguments do; raises what a lost replica raises."""
        answer: Effects = await self.stages.encoder.effects.remote(request, asked)
        return answer

    async def arguments(self, names: tuple[str, ...]) -> list[ArgumentDescription] | None:
        """Those that the checkpoint reads, learned when they are first asked for; None: not known yet."""
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
        answer: list[ArgumentDescription] = await ask.remote(names, self.default_arguments, self.name)
        return answer

    @property
    def names(self) -> tuple[str, ...]:
        """All that callers may use, the first its own."""
        return self.name, *self.aliases
