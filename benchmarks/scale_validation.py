"""The simulation of a cluster against a real application on this machine, for the very same arrivals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.cluster_simulation import Arrival, RequestKind, Stage, simulate
from benchmarks.open_loop import open_loop, percentile, poisson_times
from benchmarks.scaling_policies import Fixed

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 300
REPLICAS = 2
STEPS = 4
LOADS = (0.4, 0.7)  # of what the denoisers can do by what was measured
REQUESTS = 10  # of each caller of the measurement
STAGES = ("encoder", "denoiser", "vae")
Line = dict[str, Any]  # of requests.jsonl


def validate(seconds: float, seed: int) -> dict[str, Any]:
    """Measures the stages, then compares `seconds` of each load: real, and simulated twice.

    `predicted` has the mean costs that were measured before; `replayed` those that each request had in the real
    run, by the stages' own clocks, so that only queues, routing and hops are predicted: on a machine that others
    use too, costs change from minute to minute.
    """
    load_average = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="triptych-scale-") as folder, application(Path(folder)) as url:
        log = Path(folder) / "cache" / "logs" / "requests.jsonl"
        costs = asyncio.run(measure(url, log))
        mean = request_kind(costs["seconds"], costs)
        rows = []
        for load in LOADS:
            times = poisson_times(load * REPLICAS / mean.seconds[1], seconds, seed)
            latencies_s, duration_s, lines = asyncio.run(run_load(url, log, times))
            own = [request_kind(stage_seconds([line]), costs) for line in lines]
            row = {
                "load": load,
                "requests": len(times),
                "mean_seconds": stage_seconds(lines),
                "real": summary(latencies_s, duration_s),
                "predicted": simulated([Arrival(time_s, mean) for time_s in times]),
                "replayed": simulated([Arrival(*each) for each in zip(times, own, strict=True)]),
            }
            print(row, flush=True)
            rows.append(row)
    return {"steps": STEPS, "replicas": REPLICAS, "load_average": load_average, "costs": costs, "rows": rows}


def request_kind(seconds: tuple[float, ...], costs: dict[str, Any]) -> RequestKind:
    """In the simulation the hand-over is part of the denoiser's work; `extra_s` takes it off the latency again."""
    encode_s, denoise_s, decode_s = seconds
    return RequestKind("request", (encode_s, denoise_s + costs["hand_over_s"], decode_s), extra_s=costs["extra_s"])


def simulated(arrivals: list[Arrival]) -> dict[str, float]:
    stages = (Stage("encoder"), Stage("denoiser", max_ongoing_requests=1), Stage("vae"))
    replicas = (1, REPLICAS, 1)
    outcome = simulate(stages, arrivals, sum(replicas), Fixed(replicas), replicas)
    duration_s = outcome.ended_s + arrivals[0].kind.extra_s - arrivals[0].time_s
    return summary([latency_s for _, latency_s in outcome.latencies_s], duration_s)


def summary(latencies_s: list[float], duration_s: float) -> dict[str, float]:
    return {
        "throughput": len(latencies_s) / duration_s,
        "p50_s": percentile(latencies_s, 0.5),
        "p95_s": percentile(latencies_s, 0.95),
    }


@contextlib.contextmanager
def application(folder: Path) -> Iterator[str]:
    """The embedded model with two denoisers, served as a user serves it; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = yaml.safe_load((ROOT / "ray_configs" / "serve_emoji_cpu.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = port
    served = config["applications"][0]
    served["args"] |= {"model": str(ROOT / served["args"]["model"]), "output_directory": str(folder / "outputs")}
    served["runtime_env"]["env_vars"] |= {
        "SGLANG_DIFFUSION_STAGE_LOGGING": "1",
        "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache"),
    }
    for deployment in served["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0.25}
        if deployment["name"] == "Denoiser":
            deployment |= {"num_replicas": REPLICAS, "max_ongoing_requests": 1}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.tools.launch", str(file)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url, folder / "outputs" / "serve.log")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(1)
    text = log.read_text(errors="replace")[-3000:] if log.exists() else ""
    raise RuntimeError(f"the application did not become ready:\n{text}")


async def measure(url: str, log: Path) -> dict[str, Any]:
    """What the stages cost while all denoisers are at work, by the stages' own clocks, and what all else takes.

    Between the end of one request and the begin of the next a denoiser waits for hops and for Serve's router:
    `hand_over_s`, the difference between its computing and the throughput with callers enough.
    """
    async with client(url) as http:
        await callers(http, "warm up", REPLICAS)
        latencies_s, _ = await callers(http, "one each", REPLICAS)
        lines = (await lines_of(log))[-len(latencies_s) :]
        full_s, duration_s = await callers(http, "full", 3 * REPLICAS)
        full = (await lines_of(log))[-len(full_s) :]
    seconds = stage_seconds(lines)
    waited_s = len(STAGES) * statistics.fmean(timing["queue_s"] for line in lines for timing in line["stages"])
    hand_over_s = max(0.0, REPLICAS * duration_s / len(full_s) - stage_seconds(full)[1])
    # Without the hand-over, which delays the next request and not this one; so it can be below zero.
    extra_s = statistics.fmean(latencies_s) - waited_s - sum(seconds) - hand_over_s
    return {"seconds": seconds, "hand_over_s": hand_over_s, "extra_s": extra_s}


async def callers(http: httpx.AsyncClient, phase: str, count: int) -> tuple[list[float], float]:
    """So many callers, each of which asks again when it has its answer: the latencies, and the seconds of it all."""
    latencies_s = []

    async def caller(name: int) -> None:
        for number in range(REQUESTS):
            started = time.perf_counter()
            await picture(http, f"{phase} {name} {number}")
            latencies_s.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(caller(name) for name in range(count)))
    return latencies_s, time.perf_counter() - started


async def lines_of(log: Path) -> list[Line]:
    """In the order in which the requests came to the encoder."""
    text = await asyncio.to_thread(log.read_text, encoding="utf-8")
    return sorted(map(json.loads, text.splitlines()), key=lambda line: str(line["stages"][0]["started_at"]))


def stage_seconds(lines: list[Line]) -> tuple[float, ...]:
    """The mean of each stage."""
    timings = [timing for line in lines for timing in line["stages"]]
    return tuple(statistics.fmean(t["compute_s"] for t in timings if t["stage"] == stage) for stage in STAGES)


async def run_load(url: str, log: Path, times: list[float]) -> tuple[list[float], float, list[Line]]:
    """Latencies in seconds, the seconds from the first arrival to the last end, and the lines of the log."""
    async with client(url) as http:

        async def send(number: int, _: float) -> None:
            await picture(http, f"load {len(times)} {number}")

        timed = await open_loop(times, send)
    lines = (await lines_of(log))[-len(times) :]
    return [each.latency_s for each in timed], max(each.ended_s for each in timed) - times[0], lines


def client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=url, timeout=300, limits=limits)


async def picture(http: httpx.AsyncClient, prompt: str) -> None:
    """Prompts differ, so that no request is answered with another's picture."""
    answer = await http.post("/v1/images/generations", json={"prompt": prompt, "num_inference_steps": STEPS})
    answer.raise_for_status()
