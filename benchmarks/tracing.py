"""What traces cost: the calls where they are off, and a request of the ingress with and without them.

    python -m benchmarks.tracing [--requests 300]

The stages are played, so a request is the ingress's own work and nothing else: a real one is far longer. The exporter
keeps the spans in memory; encoding and sending them is a thread of its own, and is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from deployments import tracing
from tests.support.in_process import serving
from tests.support.traced import Traces, tracing_here

ROUNDS = 7
CALLS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, help="of each round")
    num_requests = parser.parse_args().requests
    off_ns = 1e9 * statistics.median(seconds_of_calls() for _ in range(ROUNDS)) / CALLS
    off, on, num_spans = asyncio.run(seconds_of_requests(num_requests))
    ratios = sorted(with_traces / without for without, with_traces in zip(off, on, strict=True))
    request_ns = 1e9 * statistics.median(off)
    of_request = num_spans * off_ns
    print(f"off: a span and what is set in it takes {off_ns:.0f} ns, {num_spans} of them {of_request / 1e3:.1f} us")
    print(f"     of {request_ns / 1e6:.2f} ms, that request with played stages: {100 * of_request / request_ns:.2f} %")
    print(f"on:  {statistics.median(ratios):.2f} times that request ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def seconds_of_calls() -> float:
    began = time.perf_counter()
    for number in range(CALLS):
        with tracing.span("make", n=number) as span:
            span.set(steps=number)
    return time.perf_counter() - began


async def seconds_of_requests(num_requests: int) -> tuple[list[float], list[float], int]:
    """Of one request, in each round without and with traces; and the spans that it has."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    num_spans = 0
    for number in range(ROUNDS + 1):
        for is_on in (False, True):
            with tracing_here() if is_on else nullcontext() as made:
                each = await seconds_of_round(num_requests)
                if isinstance(made, Traces):
                    num_spans = round(len(made.spans) / num_requests)
            if number:  # the first is to get warm
                seconds[is_on].append(each)
    return seconds[False], seconds[True], num_spans


async def seconds_of_round(num_requests: int) -> float:
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "outputs") as server:
        async with server.client() as client:
            body = {"prompt": "a fox", "num_inference_steps": 4}
            await client.post("/v1/images/generations", json=body)
            began = time.perf_counter()
            for seed in range(num_requests - 1):
                answer = await client.post("/v1/images/generations", json=body | {"seed": seed})
                answer.raise_for_status()
            return (time.perf_counter() - began) / num_requests


if __name__ == "__main__":
    main()
