"""Ray Serve's own part of a request: its proxy, an ingress, and three deployments that do nothing.

    python -m benchmarks.empty_chain [PORT]

The calls are those of serve_app/making/generate.py, and 300 kB go from the first to the second, as the text of the
embedded model does. benchmarks.overhead runs it beside the application.
"""

import sys
from collections.abc import AsyncIterator
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

TEXT_BYTES = 300_000
app = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0})
class First:
    async def encode(self, number: int) -> bytes:
        return bytes(TEXT_BYTES)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Second:
    async def denoise(self, number: int, text: bytes) -> AsyncIterator[int]:
        yield len(text)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Third:
    async def decode(self, number: int, latents: int) -> int:
        return latents


@serve.deployment(name="Empty", ray_actor_options={"num_cpus": 0})
@serve.ingress(app)
class Empty:
    def __init__(self, first: DeploymentHandle, second: DeploymentHandle, third: DeploymentHandle) -> None:
        self.first, self.second, self.third = first, second, third

    @app.post("/")
    async def run(self) -> int:
        text: Any = self.first.encode.remote(0)
        stream: Any = self.second.options(stream=True).denoise.remote(0, text)
        [latents] = [item async for item in await stream._to_object_ref_gen()]
        made: int = await self.third.decode.remote(0, latents)
        return made


def main() -> None:
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Empty.bind(First.bind(), Second.bind(), Third.bind()), blocking=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
