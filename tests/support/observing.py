"""What observers are told, for their tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from deployments.messages import STAGES, GenerationRequest, OutputFormat, StageName
from deployments.observability.observer import ObservedReplica, StageWork
from env_config.variables import EnvConfig


def replica_with(
    variables: dict[str, str], replica_id: str = "replica", synchronize: Callable[[], None] = lambda: None
) -> ObservedReplica:
    """A replica of all stages, told these variables."""
    return ObservedReplica(EnvConfig.from_environ(variables), replica_id, STAGES, synchronize)


def work_on(request_id: str, stage: StageName, arrived: float | None = None, **fields: Any) -> StageWork:
    """A stage's work on a request that has just come, unless `arrived` says when."""
    request = GenerationRequest(request_id, "tiny", {}, 0, OutputFormat("image", "png"))
    return StageWork(stage, request, time.time() if arrived is None else arrived, **fields)
