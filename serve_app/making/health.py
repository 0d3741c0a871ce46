"""Whether every stage can serve, asked of the stages themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.errors import StageUnavailableError
from deployments.messages import StageDescription
from deployments.starting import told_start
from serve_app.making.ray_errors import first_line
from serve_app.making.stages import Stages

T = TypeVar("T")

TIMEOUT_S = 2.0
# Of its own, so that a controller that never answers keeps this one thread and no other.
CONTROLLER_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="controller")
NO_ANSWER = "no replica answered in time: it is still loading, or it is down"


async def read_health(stages: Stages) -> dict[str, Any]:
    """The content of GET /health: each deployment, and which of them cannot serve."""
    answers = await describe_stages(stages)
    details = {name: _detail(answer) for name, answer in answers.items()}
    silent = {name for name, answer in answers.items() if answer == NO_ANSWER}
    if silent:
        application = stages.encoder.app_name
        running = await _in_time(set[str](), running_deployments, application)
        for name in silent & running:
            details[name] = {"ready": True, "detail": "its replicas are busy"}
        for name, told in (await _in_time(dict[str, str](), starts_of, application, silent - running)).items():
            details[name]["detail"] = told
    missing = [name for name, detail in details.items() if not detail["ready"]]
    return {"status": "loading" if missing else "ok", "stages": details, "missing": missing}


async def _in_time(otherwise: T, ask: Callable[..., T], *about: Any) -> T:
    """`otherwise` where Serve's controller or Ray's store does not answer: they may be stopped."""
    asking = asyncio.get_running_loop().run_in_executor(CONTROLLER_THREAD, ask, *about)
    try:
        return await asyncio.wait_for(asking, TIMEOUT_S)
    except TimeoutError:
        return otherwise


def _detail(answer: StageDescription | str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"ready": False, "detail": answer}
    return {
        "ready": True,
        "detail": f"{answer.pipeline_class} on {answer.device}",
        "process_id": answer.process_id,
        "weight_bytes": answer.weight_bytes,
    }


def running_deployments(application: str) -> set[str]:
    """Those with a replica that Serve's controller has found healthy; empty when the controller cannot be asked.

    A question to a replica waits behind the requests that wait for it, so under load it says nothing.
    """
    try:
        deployments = serve.status().applications[application].deployments
    except (RayError, RayServeException, KeyError):
        return set()
    return {name for name, deployment in deployments.items() if deployment.replica_states.get("RUNNING", 0)}


def starts_of(application: str, deployments: set[str]) -> dict[str, str]:
    """What those that start tell of it, such as how far they are warmed up."""
    told = {name: told_start(application, name) for name in deployments}
    return {name: text for name, text in told.items() if text is not None}


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
        return NO_ANSWER
    except (RayActorError, StageUnavailableError) as error:
        return f"a replica died: {first_line(error)}"


async def _ask(handle: DeploymentHandle) -> Any:
    return await handle.describe.remote()
