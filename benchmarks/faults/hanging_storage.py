"""What a storage that hangs costs: pictures in a minute while S3 is stopped, and before and after it.

    python -m benchmarks.faults.hanging_storage

Needs what `python -m benchmarks.faults` needs. Callers ask for URLs, so that each picture is to be stored. Exits with 1
when a call failed, or a picture is not in S3 at the end.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from contextlib import closing
from urllib.parse import urlsplit

import httpx

from benchmarks.faults.cluster import FaultCluster, fault_cluster
from benchmarks.faults.faults import s3_processes
from benchmarks.faults.load import client
from benchmarks.report import machine

CALLERS = 6
PICTURE = {"prompt": "a red apple", "size": "64x64", "num_inference_steps": 8, "response_format": "url"}
WARM_UP_S, UNDISTURBED_S, HANGING_S = 20, 90, 180
UPLOADED_WITHIN_S = 120


def main() -> int:
    with fault_cluster() as cluster:
        return asyncio.run(run(cluster))


async def run(cluster: FaultCluster) -> int:
    seeds = itertools.count(1)
    print(f"{machine()}. {CALLERS} callers.\n", flush=True)
    async with client(cluster.url) as http:
        await pictures(http, seeds, WARM_UP_S)
        before = await pictures(http, seeds, UNDISTURBED_S)
        for process in s3_processes(cluster):
            process.suspend()
        during = await pictures(http, seeds, HANGING_S)
        for process in s3_processes(cluster):
            process.resume()
        after = await pictures(http, seeds, UNDISTURBED_S)
    undisturbed = (len(before) + len(after)) / (2 * UNDISTURBED_S)
    hanging = len(during) / HANGING_S
    print(f"pictures/s before {len(before) / UNDISTURBED_S:.2f}, while S3 hangs {hanging:.2f}, ", end="")
    print(f"after {len(after) / UNDISTURBED_S:.2f}; ratio {hanging / undisturbed:.3f}", flush=True)
    missing = await missing_in_s3(cluster, during)
    print(f"of {len(during)} pictures made meanwhile, {len(missing)} are not in S3 afterwards")
    return 1 if missing else 0


async def pictures(http: httpx.AsyncClient, seeds: itertools.count[int], seconds: float) -> list[str]:
    """The URLs of what the callers got in this time, one after another each; raises httpx.HTTPStatusError."""
    ends_at, urls = time.monotonic() + seconds, list[str]()

    async def caller() -> None:
        while time.monotonic() < ends_at:
            answer = await http.post("/pictures/v1/images/generations", json=PICTURE | {"seed": next(seeds)})
            url = answer.raise_for_status().json()["data"][0]["url"]
            if time.monotonic() < ends_at:
                urls.append(url)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return urls


async def missing_in_s3(cluster: FaultCluster, urls: list[str]) -> set[str]:
    """Names of files, once the spool has had its time."""
    wanted = {urlsplit(url).path.rpartition("/")[2] for url in urls}
    for _ in range(UPLOADED_WITHIN_S):
        if wanted <= await asyncio.to_thread(stored, cluster):
            break
        await asyncio.sleep(1)
    return wanted - await asyncio.to_thread(stored, cluster)


def stored(cluster: FaultCluster) -> set[str]:
    with closing(cluster.s3.client()) as s3:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket="outputs")
        return {item["Key"].rpartition("/")[2] for page in pages for item in page.get("Contents", [])}


if __name__ == "__main__":
    sys.exit(main())
