"""Whether the memory of a process grows with what it has served: 1,000 requests and 200 cancels.

    python -m benchmarks.faults.memory

Needs what `python -m benchmarks.faults` needs. Prints the resident megabytes of each process after every fifth of the
work; the first fifth fills caches, pools and allocators.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

import httpx
import psutil

from benchmarks.faults.cluster import APPLICATIONS, FaultCluster, fault_cluster
from benchmarks.faults.load import client
from benchmarks.report import machine

PICTURES = "pictures"
ROUNDS, REQUESTS, CANCELS = 5, 200, 40  # requests and cancels of a round
AT_ONCE = 6
PICTURE = {"prompt": "a red apple", "size": "64x64", "num_inference_steps": 2}
LONG = PICTURE | {"num_inference_steps": 900, "background": True}


def main() -> int:
    with fault_cluster({PICTURES: APPLICATIONS[PICTURES]}) as cluster:
        asyncio.run(run(cluster))
    return 0


async def run(cluster: FaultCluster) -> None:
    parts = parts_of(cluster)
    print(f"{machine()}. {ROUNDS} rounds of {REQUESTS} requests and {CANCELS} cancels; resident MB.\n")
    print(f"| after requests | {' | '.join(parts)} |\n|--:|{'--:|' * len(parts)}", flush=True)
    print(line(0, parts), flush=True)
    seeds, slots = itertools.count(1), asyncio.Semaphore(AT_ONCE)
    async with client(cluster.url) as http:
        for number in range(1, ROUNDS + 1):
            pictures = [picture(http, slots, next(seeds)) for _ in range(REQUESTS)]
            cancels = [cancelled(http, slots, next(seeds)) for _ in range(CANCELS)]
            await asyncio.gather(*pictures, *cancels)
            print(line(number * REQUESTS, parts), flush=True)


def parts_of(cluster: FaultCluster) -> dict[str, psutil.Process]:
    """The processes that a request of the picture application passes."""
    replicas = {name: cluster.replicas(name)[0] for name in ("Ingress", "Encoder", "Denoiser", "VAE")}
    [proxy] = cluster.processes("ray::ProxyActor")
    return {"proxy": proxy} | {name.lower(): process for name, process in replicas.items()}


def line(requests: int, parts: dict[str, psutil.Process]) -> str:
    megabytes = (f"{process.memory_info().rss / 1e6:.0f}" for process in parts.values())
    return f"| {requests} | {' | '.join(megabytes)} |"


async def picture(http: httpx.AsyncClient, slots: asyncio.Semaphore, seed: int) -> None:
    async with slots:
        answer = await http.post(f"/{PICTURES}/v1/images/generations", json=PICTURE | {"seed": seed})
        answer.raise_for_status()


async def cancelled(http: httpx.AsyncClient, slots: asyncio.Semaphore, seed: int) -> None:
    async with slots:
        answer = await http.post(f"/{PICTURES}/v1/images/generations", json=LONG | {"seed": seed})
        job = answer.raise_for_status().json()
        await asyncio.sleep(0.2)  # some are cancelled in the queue, some in the middle of their steps
        (await http.post(f"/{PICTURES}/v1/jobs/{job['id']}/cancel")).raise_for_status()


if __name__ == "__main__":
    sys.exit(main())
