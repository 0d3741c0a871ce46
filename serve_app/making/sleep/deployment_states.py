"""What Serve's controller says of the deployments of an application, without a call of their replicas."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

# asleep: it has no replica, and is to have none; waking: it had none, and the first is being started.
State = Literal["running", "starting", "asleep", "waking", "failed"]

TIMEOUT_S = 2.0
# Of its own, so that a controller that never answers keeps this one thread and no other.
CONTROLLER_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="controller")


def deployment_states(application: str) -> dict[str, State]:
    """Of each deployment; empty when the controller cannot be asked."""
    if not ray.is_initialized():  # in no cluster: Serve would start one to ask it
        return {}
    try:
        deployments = serve.status().applications[application].deployments
    except (RayError, RayServeException, KeyError):
        return {}
    return {name: state_of(each.status, each.replica_states) for name, each in deployments.items()}


def state_of(status: str, replicas: Mapping[str, int]) -> State:
    """By Serve's status of a deployment and the number of its replicas in each state."""
    if replicas.get("RUNNING", 0):
        return "running"
    if status in ("UNHEALTHY", "DEPLOY_FAILED"):
        return "failed"
    to_come = sum(count for state, count in replicas.items() if state != "STOPPING")
    if not to_come and status in ("HEALTHY", "DOWNSCALING"):
        return "asleep"
    return "waking" if status == "UPSCALING" else "starting"


class DeploymentStates:
    """Asks the controller once for all who ask at the same time; an ingress replica has one."""

    def __init__(self, application: str, ask: Callable[[str], Mapping[str, State]] = deployment_states) -> None:
        self.application = application
        self._ask = ask
        self._answer: Mapping[str, State] = {}
        self._answered_at = -TIMEOUT_S  # monotonic: when it was asked
        self._asking: asyncio.Task[Mapping[str, State]] | None = None
        self._asked_at = 0.0

    async def read(self, max_age_s: float = 0.0, or_last: bool = True) -> Mapping[str, State]:
        """Not older than `max_age_s`, where the controller answers within TIMEOUT_S.

        Else its last answer: a controller that is slow must not make those who watch a model wake it. Empty where it
        never answered, or without `or_last`.
        """
        now = time.monotonic()
        if now - self._answered_at <= max_age_s:
            return self._answer
        if self._asking is None or self._asking.done():
            # An empty context: it does not end with the HTTP request that began it.
            self._asking = asyncio.get_running_loop().create_task(self._asked(now), context=contextvars.Context())
            self._asked_at = now
        left_s = self._asked_at + TIMEOUT_S - now
        answer: Mapping[str, State] = {}
        with contextlib.suppress(TimeoutError):
            answer = await asyncio.wait_for(asyncio.shield(self._asking), max(0.0, left_s))
        return answer or (self._answer if or_last else {})

    async def _asked(self, at: float) -> Mapping[str, State]:
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(CONTROLLER_THREAD, self._ask, self.application)
        if answer:
            self._answer, self._answered_at = answer, at
        return answer
