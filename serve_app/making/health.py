"""Whether every stage can serve, asked of the stages themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

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
State = Literal["running", "failed"]

TIMEOUT_S = 2.0
# Of its own, so that a controller that never answers keeps this one thread and no other.
CONTROLLER_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="controller")
FAILED = "its replicas fail to start: the server's log says why"
NO_ANSWER = "no replica answered in time: it is still loading, or it is down"


async def read_health(models: Mapping[str, Stages]) -> dict[str, Any]:
    """The content of GET /health: each deployment, and which of them cannot serve.

    `models`: the stages of each, by its name.
    """
    answers = await asyncio.gather(*(describe_stages(stages) for stages in models.values()))
    details = {name: _detail(answer) for answered in answers for name, answer in answered.items()}
    silent = {name for answered in answers for name, answer in answered.items() if answer == NO_ANSWER}
    if silent:
        application = next(iter(models.values())).encoder.app_name
        known = await _in_time(dict[str, State](), deployment_states, application)
        running = {name for name in silent if known.get(name) == "running"}
        for name in running:
            details[name] = {"ready": True, "detail": "its replicas are busy"}
        for name in silent - running:
            details[name]["detail"] = FAILED if known.get(name) == "failed" else NO_ANSWER
        for name, told in (await _in_time(dict[str, str](), starts_of, application, silent - running)).items():
            details[name]["detail"] = told
    missing = [name for name, detail in details.items() if not detail["ready"]]
    states = {
        name: "loading" if any(each in missing for each in stages.deployments()) else "ready"
        for name, stages in models.items()
    }
    return {"status": "loading" if missing else "ok", "models": states, "stages": details, "missing": missing}


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
        **({"shared": dict(answer.shared)} if answer.shared else {}),
    }


def deployment_states(application: str) -> dict[str, State]:
    """Those with a replica that Serve's controller has found healthy, and those whose replicas it could not start.

    Empty when the controller cannot be asked. A question to a replica waits behind the requests that wait for it, so
    under load it says nothing.
    """
    try:
        deployments = serve.status().applications[application].deployments
    except (RayError, RayServeException, KeyError):
        return {}
    states: dict[str, State] = {}
    for name, deployment in deployments.items():
        if deployment.replica_states.get("RUNNING", 0):
            states[name] = "running"
        elif deployment.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            states[name] = "failed"
    return states


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
