"""The model that is served, as the ingress knows it: its name, and what its stages say of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import ModelNotFoundError, StageUnavailableError
from deployments.messages import StageDescription
from serve_app.making.health import describe_stages
from serve_app.making.stages import Stages


@dataclass
class ServedModel:
    """Describes itself when it is first asked: a replica of the ingress is ready before those of the stages."""

    name: str
    stages: Stages
    default_arguments: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)  # arguments by level
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time in seconds
    _description: StageDescription | None = field(default=None, init=False)

    async def describe(self) -> StageDescription:
        """Raises StageUnavailableError while the encoder cannot answer."""
        if self._description is None:
            answers = await describe_stages(self.stages)
            answer = answers[self.stages.encoder.deployment_name]
            if isinstance(answer, str):
                raise StageUnavailableError(f"the model is not ready: {answer}")
            self._description = answer
        return self._description

    def check_name(self, name: str | None) -> None:
        """Raises ModelNotFoundError for another name; None stands for this model."""
        if name is not None and name != self.name:
            raise ModelNotFoundError(f"The model {name[:80]!r} is not served here; this server has {self.name!r}")
