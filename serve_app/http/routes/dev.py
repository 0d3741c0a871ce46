"""The `/dev/...` routes, which are there only with SGLANG_DIFFUSION_SERVER_DEV_MODE.

They show configuration and stacks: do not open them to the public.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.routing import APIRoute
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from env_config.told.effective import effective_values
from serve_app.service import Service

TIMEOUT_S = 30.0
MAX_WINDOW_S = 60.0


def dev_routes(service: Service) -> APIRouter | None:
    """None where dev mode is off: then each of them is a route that does not exist."""
    if not service.env.runtime.server_dev_mode:
        return None
    router = APIRouter(prefix="/dev", include_in_schema=False)
    handles = service.models.deployments()

    @router.get("")
    async def list_routes() -> dict[str, str]:
        """The routes and what they answer."""
        return {
            f"{', '.join(sorted(route.methods or ()))} {route.path}": (route.endpoint.__doc__ or "").strip()
            for route in router.routes
            if isinstance(route, APIRoute)
        }

    @router.get("/config")
    async def show_configuration() -> dict[str, Any]:
        """The 45 variables in effect in this ingress and in every replica of the stages; secrets are masked."""
        replicas = await ask_all(handles, "inspect")
        return {
            "Ingress": [asdict(value) for value in effective_values(service.env)],
            **{name: {r["replica_id"]: r["environment"] for r in answers} for name, answers in replicas.items()},
        }

    @router.get("/replicas")
    async def show_replicas() -> dict[str, Any]:
        """Every replica, the requests that run or wait in it, and what its step engine did."""
        replicas = await ask_all(handles, "inspect")
        return {name: [without(answer, "environment") for answer in answers] for name, answers in replicas.items()}

    @router.get("/stacks")
    async def show_stacks() -> dict[str, Any]:
        """The stack of each thread of every replica."""
        return await ask_all(handles, "thread_stacks")

    @router.post("/profiler/start")
    async def start_profiler(
        max_s: Annotated[float, Body(gt=0, le=MAX_WINDOW_S, embed=True)] = MAX_WINDOW_S,
    ) -> dict[str, Any]:
        """Open a torch profiler window of at most `max_s` seconds in every replica; answers the files to come."""
        return await ask_all(handles, "start_profiler", max_s)

    @router.post("/profiler/stop")
    async def stop_profiler() -> dict[str, Any]:
        """End the windows; answers the files, which are complete."""
        return await ask_all(handles, "stop_profiler")

    @router.get("/features")
    async def show_features() -> dict[str, Any]:
        """What each feature has done for the latest requests of every replica."""
        return await ask_all(handles, "feature_summaries")

    @router.get("/cache_dit")
    async def show_cache_dit() -> dict[str, Any]:
        """Steps and blocks that Cache-DiT computed and reused, for the last cached requests of every replica."""
        replicas = await ask_all(handles, "feature_summaries")
        return {
            name: [{"replica_id": a["replica_id"], "requests": a["features"].get("cache_dit", [])} for a in answers]
            for name, answers in replicas.items()
        }

    @router.get("/caches")
    async def show_caches() -> dict[str, Any]:
        """Bytes of each folder below the cache root and of the device's memory, for every replica."""
        return await ask_all(handles, "caches")

    @router.post("/caches/clear")
    async def clear_caches() -> dict[str, Any]:
        """Forget past requests and give unused memory back, in every replica; files stay."""
        return await ask_all(handles, "clear_caches")

    return router


async def ask_all(handles: Mapping[str, DeploymentHandle], method: str, *arguments: Any) -> dict[str, list[Any]]:
    """The answers of all replicas, by the names of their deployments; raises what the first refusal raises.

    A deployment that sleeps has none.
    """
    answers = await asyncio.gather(*(_all_of(handle, method, *arguments) for handle in handles.values()))
    return dict(zip(handles, answers, strict=True))


async def _all_of(handle: DeploymentHandle, method: str, *arguments: Any) -> list[Any]:
    try:
        answers: list[Any] = await handle.broadcast(method, *arguments).results_async(timeout_s=TIMEOUT_S)
    except DeploymentUnavailableError:
        return []
    return answers


def without(answer: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key != name}
