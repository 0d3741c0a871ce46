"""The `/dev/...` routes, which are there only with SGLANG_DIFFUSION_SERVER_DEV_MODE: otherwise each is a 404.

Serve pickles the routes before any replica reads its variables, so they are always declared; a dependency
answers like a route that does not exist. They show configuration and stacks: do not open them to the public.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Body, Depends, HTTPException
from fastapi.routing import APIRoute
from ray import serve

from env_config.effective import effective_values
from env_config.variables import EnvConfig
from serve_app.making.generate import Stages

TIMEOUT_S = 30.0
MAX_WINDOW_S = 60.0


class IngressReplica(Protocol):
    """What these routes use of the ingress."""

    env: EnvConfig
    stages: Stages


def ingress_in_dev_mode() -> IngressReplica:
    """Raises HTTPException 404 when dev mode is off."""
    ingress: IngressReplica = serve.get_replica_context().servable_object
    if not ingress.env.runtime.server_dev_mode:
        raise HTTPException(404)
    return ingress


Ingress = Annotated[IngressReplica, Depends(ingress_in_dev_mode)]

dev_routes = APIRouter(prefix="/dev", include_in_schema=False)


@dev_routes.get("")
async def list_routes(ingress: Ingress) -> dict[str, str]:
    """The routes and what they answer."""
    return {
        f"{', '.join(sorted(route.methods or ()))} {route.path}": (route.endpoint.__doc__ or "").strip()
        for route in dev_routes.routes
        if isinstance(route, APIRoute)
    }


@dev_routes.get("/config")
async def show_configuration(ingress: Ingress) -> dict[str, Any]:
    """The 45 variables in effect in this ingress and in every replica of the stages; secrets are masked."""
    replicas = await ask_all(ingress.stages, "inspect")
    return {
        "Ingress": [asdict(value) for value in effective_values(ingress.env)],
        **{name: {r["replica_id"]: r["environment"] for r in answers} for name, answers in replicas.items()},
    }


@dev_routes.get("/replicas")
async def show_replicas(ingress: Ingress) -> dict[str, Any]:
    """Every replica, the requests that run or wait in it, and what its step engine did."""
    replicas = await ask_all(ingress.stages, "inspect")
    return {name: [without(answer, "environment") for answer in answers] for name, answers in replicas.items()}


@dev_routes.get("/stacks")
async def show_stacks(ingress: Ingress) -> dict[str, Any]:
    """The stack of each thread of every replica."""
    return await ask_all(ingress.stages, "thread_stacks")


@dev_routes.post("/profiler/start")
async def start_profiler(
    ingress: Ingress, max_s: Annotated[float, Body(gt=0, le=MAX_WINDOW_S, embed=True)] = MAX_WINDOW_S
) -> dict[str, Any]:
    """Open a torch profiler window of at most `max_s` seconds in every replica; answers the files to come."""
    return await ask_all(ingress.stages, "start_profiler", max_s)


@dev_routes.post("/profiler/stop")
async def stop_profiler(ingress: Ingress) -> dict[str, Any]:
    """End the windows; answers the files, which are complete."""
    return await ask_all(ingress.stages, "stop_profiler")


@dev_routes.get("/cache_dit")
async def show_cache_dit(ingress: Ingress) -> dict[str, Any]:
    """Steps and blocks that Cache-DiT computed and reused, for the last cached requests of every replica."""
    return await ask_all(ingress.stages, "cache_dit_summary")


@dev_routes.get("/caches")
async def show_caches(ingress: Ingress) -> dict[str, Any]:
    """Bytes of each folder below the cache root and of the device's memory, for every replica."""
    return await ask_all(ingress.stages, "caches")


@dev_routes.post("/caches/clear")
async def clear_caches(ingress: Ingress) -> dict[str, Any]:
    """Forget past requests and give unused memory back, in every replica; files stay."""
    return await ask_all(ingress.stages, "clear_caches")


async def ask_all(stages: Stages, method: str, *arguments: Any) -> dict[str, list[Any]]:
    """The answers of all replicas, by the names of their deployments; raises what the first refusal raises."""
    handles = stages.deployments()
    answers = await asyncio.gather(
        *(handle.broadcast(method, *arguments).results_async(timeout_s=TIMEOUT_S) for handle in handles.values())
    )
    return dict(zip(handles, answers, strict=True))


def without(answer: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key != name}
