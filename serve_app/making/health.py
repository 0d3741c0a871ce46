"""Whether every stage can serve, asked of the stages themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deployments.errors import StageUnavailableError
from deployments.messages import StageDescription
from deployments.starting import told_start
from serve_app.making.ray_errors import first_line
from serve_app.making.sleep.deployment_states import CONTROLLER_THREAD, State, deployment_states
from serve_app.making.sleep.model_sleep import FRESH_S, RESTING
from serve_app.making.stages import Stages

T = TypeVar("T")

TIMEOUT_S = 2.0
FAILED = "its replicas fail to start: the server's log says why"
NO_ANSWER = "no replica answered in time: it is still loading, or it is down"
UNKNOWN = "Serve's controller has not answered yet: it is not known what runs"


async def read_health(models: Mapping[str, Stages]) -> dict[str, Any]:
    """The content of GET /health: each deployment, and which of them cannot serve.

    `models`: the stages of each, by its name.
    """
    resting = await resting_stages(models)
    answers = await asyncio.gather(*(describe_stages(stages, but=resting) for stages in models.values()))
    details = {name: _detail(answer) for answered in answers for name, answer in answered.items()}
    failing = {name: answer for answered in answers for name, answer in answered.items() if isinstance(answer, str)}
    if failing:
        application = next(iter(models.values())).encoder.app_name
        known = await _in_time(dict[str, State](), deployment_states, application)
        gone = {name for name in failing if known.get(name) in RESTING}  # between the look before and the question
        resting |= await words_of_those(models, gone)
        silent = {name for name, answer in failing.items() if answer == NO_ANSWER} - gone
        running = {name for name in silent if known.get(name) == "running"}
        for name in running:
            details[name] = {"ready": True, "detail": "its replicas are busy"}
        for name in silent - running:
            details[name]["detail"] = FAILED if known.get(name) == "failed" else NO_ANSWER
        for name, told in (await _in_time(dict[str, str](), starts_of, application, silent - running)).items():
            details[name]["detail"] = told
    details |= {name: {"ready": False, "detail": words} for name, words in resting.items()}
    resting = {name: words for name, words in resting.items() if words != UNKNOWN}
    missing = [name for name, detail in details.items() if not detail["ready"] and name not in resting]
    states = {name: await _state_of(stages, missing) for name, stages in models.items()}
    return {"status": "loading" if missing else "ok", "models": states, "stages": details, "missing": missing}


async def resting_stages(models: Mapping[str, Stages]) -> dict[str, str]:
    """The deployments that nobody may ask, with what is told of them.

    Those of models that sleep or are being woken, which is no failure; and all while nobody knows what is there
    (UNKNOWN), which is one.
    """
    states: dict[str, State] = {}
    for stages in models.values():
        states |= await stages.sleep.resting_deployments()
    unknown = {name for name, state in states.items() if state not in RESTING}
    return dict.fromkeys(unknown, UNKNOWN) | await words_of_those(models, states.keys() - unknown)


async def words_of_those(models: Mapping[str, Stages], resting: Collection[str]) -> dict[str, str]:
    told: dict[str, str] = {}
    for stages in models.values():
        if names := [name for name in stages.deployments() if name in resting]:
            await stages.sleep.facts()
            told |= dict.fromkeys(names, stages.sleep.words())
    return told


async def _state_of(stages: Stages, missing: Collection[str]) -> str:
    if any(name in missing for name in stages.deployments()):
        return "loading"
    state = await stages.sleep.state(FRESH_S)
    return state if state == "asleep" else "loading" if state == "waking" else "ready"


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


def starts_of(application: str, deployments: set[str]) -> dict[str, str]:
    """What those that start tell of it, such as how far they are warmed up."""
    told = {name: told_start(application, name) for name in deployments}
    return {name: text for name, text in told.items() if text is not None}


async def describe_stages(
    stages: Stages, timeout_s: float = TIMEOUT_S, but: Collection[str] = ()
) -> dict[str, StageDescription | str]:
    """What each deployment holds, or why it cannot answer within `timeout_s`; asked at the same time.

    `but`: those that are not asked, because a call would wake them.
    """
    handles = {name: handle for name, handle in stages.deployments().items() if name not in but}
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
