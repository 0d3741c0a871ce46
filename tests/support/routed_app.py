"""A Serve application, without torch, whose replicas hold a LoRA each; its ingress tells which one took a request."""

import asyncio
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from deployments.adapters.use import AdapterUse
from deployments.messages import GenerationRequest, OutputFormat
from deployments.replicas.adapter_routing import HELD, holders_first

api = FastAPI()


class NoArgs(BaseModel):
    """There is nothing to say."""


@serve.deployment(num_replicas=2, request_router_config=holders_first(), ray_actor_options={"num_cpus": 0.01})
class Holder:
    """Holds one LoRA, whose digest is the replica's own id."""

    def __init__(self) -> None:
        self.id = serve.get_replica_context().replica_id.unique_id

    async def record_routing_stats(self) -> dict[str, Any]:
        return {HELD: [self.id]}

    async def take(self, request: GenerationRequest, seconds: float = 0) -> str:
        await asyncio.sleep(seconds)
        return self.id

    async def who(self) -> str:
        return self.id


def asking_for(digest: str) -> GenerationRequest:
    features = {"loras": [AdapterUse("a", "/a", digest=digest).plain()]}
    return GenerationRequest("1", "toy", {}, 0, OutputFormat("image", "png"), features=features)


@serve.deployment(ray_actor_options={"num_cpus": 0.01})
@serve.ingress(api)  # takes with it what is defined above
class Ingress:
    def __init__(self, holder: DeploymentHandle) -> None:
        self.holder = holder

    @api.get("/health")
    async def health(self) -> list[str]:
        """The ids of the replicas."""
        ids: list[str] = await self.holder.broadcast("who").results_async(timeout_s=10)
        return ids

    @api.get("/taken")
    async def taken(self, digest: str, times: int) -> list[str]:
        """Who took each of `times` requests that came one after the other."""
        return [await self.holder.take.remote(asking_for(digest)) for _ in range(times)]

    @api.get("/taken_beside")
    async def taken_beside(self, digest: str) -> list[str]:
        """Who took a request that lasts, and who one like it that came meanwhile."""
        first = asyncio.ensure_future(self._take(digest, 1.5))
        await asyncio.sleep(0.5)
        return [await self._take(digest), await first][::-1]

    async def _take(self, digest: str, seconds: float = 0) -> str:
        id: str = await self.holder.take.remote(asking_for(digest), seconds)
        return id


def build_app(args: NoArgs) -> Application:
    return Ingress.bind(Holder.bind())
