"""Whether every stage can serve, asked of the stages themselves."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.errors import StageUnavailableError
from deployments.messages import StageDescription
from serve_app.generation import Stages, first_line

TIMEOUT_S = 2.0


async def read_health(stages: Stages) -> dict[str, Any]:
    """The content of GET /health: each deployment, and which of them cannot serve."""
    answers = await describe_stages(stages)
    details = {name: _detail(answer) for name, answer in answers.items()}
    missing = [name for name, detail in details.items() if not detail["ready"]]
    return {"status": "loading" if missing else "ok", "stages": details, "missing": missing}


def _detail(answer: StageDescription | str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"ready": False, "detail": answer}
    return {
        "ready": True,
        "detail": f"{answer.pipeline_class} on {answer.device}",
        "process_id": answer.process_id,
        "weight_bytes": answer.weight_bytes,
    }


async def describe_stages(stages: Stages, timeout_s: float = TIMEOUT_S) -> dict[str, StageDescription | str]:
    """What each deployment holds, or why it cannot answer within `timeout_s`; asked at the same time."""
    handles = stages.deployments()
    answers = await asyncio.gather(*(_describe(handle, timeout_s) for handle in handles.values()))
    return dict(zip(handles, answers, strict=True))


async def _describe(handle: DeploymentHandle, timeout_s: float) -> StageDescription | str:
    try:
        answer: StageDescription = await asyncio.wait_for(_ask(handle), timeout_s)
        return answer
    except TimeoutError:
        return f"no replica answered within {timeout_s:g} s: it is still loading, or it is down"
    except (RayActorError, StageUnavailableError) as error:
        return f"a replica died: {first_line(error)}"


async def _ask(handle: DeploymentHandle) -> Any:
    return await handle.describe.remote()
