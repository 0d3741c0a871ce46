"""The ways to make the same picture that benchmarks.side_by_side compares: what starts each, and one request to it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil
import yaml

from benchmarks.openai_requests import checked
from serve_app.tools.launch import processes_of_session

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "ray_configs" / "serve_emoji_cpu.yaml"
EMOJI = ROOT / "checkpoints" / "emoji-flux"
START_TIMEOUT_S = 600


@dataclass(frozen=True)
class Picture:
    """One request: `side` in pixels, `text_tokens` is the pipeline's max_sequence_length."""

    prompt: str
    seed: int
    side: int
    steps: int
    text_tokens: int


@dataclass(frozen=True)
class Made:
    """A PNG file, and the seconds of its parts where the server tells them."""

    png: bytes
    timings: dict[str, float] = field(default_factory=dict)


class Way(Protocol):
    async def make(self, picture: Picture, deterministic: bool = False) -> Made:
        """Raises openai_requests.RequestError or what httpx raises."""


@dataclass(frozen=True)
class InProcess:
    """benchmarks.rivals.in_process; callers wait for each other."""

    process: asyncio.subprocess.Process
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def make(self, picture: Picture, deterministic: bool = False) -> Made:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        async with self.lock:
            self.process.stdin.write(json.dumps(asdict(picture)).encode() + b"\n")
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process with the pipeline ended")
        return Made(base64.b64decode(line))


@dataclass(frozen=True)
class RayExample:
    """benchmarks.rivals.ray_example."""

    http: httpx.AsyncClient

    async def make(self, picture: Picture, deterministic: bool = False) -> Made:
        return Made(checked(await self.http.get("/imagine", params=asdict(picture))).content)


@dataclass(frozen=True)
class DiffusersServer:
    """benchmarks.rivals.diffusers_server; its caller fetches the picture from the URL in the answer."""

    http: httpx.AsyncClient

    async def make(self, picture: Picture, deterministic: bool = False) -> Made:
        answer = checked(await self.http.post("/v1/images/generations", json=asdict(picture)))
        return Made(checked(await self.http.get(answer.json()["data"][0]["url"])).content)


@dataclass(frozen=True)
class Triptych:
    """This project."""

    http: httpx.AsyncClient

    async def make(self, picture: Picture, deterministic: bool = False) -> Made:
        body = {
            "prompt": picture.prompt,
            "seed": picture.seed,
            "size": f"{picture.side}x{picture.side}",
            "num_inference_steps": picture.steps,
            "max_sequence_length": picture.text_tokens,
            "deterministic": deterministic,
        }
        content = checked(await self.http.post("/v1/images/generations", json=body)).json()
        return Made(base64.b64decode(content["data"][0]["b64_json"]), content["timings"][0])


LABELS = {
    "in_process": "(a) diffusers in process",
    "in_process_all_cores": "(a2) diffusers in process, a thread for each core",
    "ray_example": "(b) Ray's example as documented",
    "ray_example_locked": "(b1) Ray's example, one request at a time",
    "ray_example_replicas": "(b2) Ray's example, one at a time, two replicas",
    "diffusers_server": "(c) diffusers' server example",
    "one_stage": "(d) Triptych, one stage",
    "three_stage": "(e) Triptych, three stages",
    "three_stage_replicas": "(e2) Triptych, three stages, two denoisers",
}
# The args of benchmarks.rivals.ray_example beside the model; Triptych's placements.
RAY_EXAMPLES: Mapping[str, dict[str, int]] = {
    "ray_example": {},
    "ray_example_locked": {"max_ongoing_requests": 1},
    "ray_example_replicas": {"max_ongoing_requests": 1, "num_replicas": 2},
}
PLACEMENTS = {
    "one_stage": ("Pipeline",),
    "three_stage": ("Encoder", "Denoiser", "VAE"),
    "three_stage_replicas": ("Encoder", "Denoiser", "VAE"),
}


@dataclass(frozen=True)
class Running:
    """A way that has started, and what says how much processor time its processes took."""

    way: Way
    processes: Processes


@contextlib.asynccontextmanager
async def running(name: str, model: Path, device: str, threads: int, port: int, folder: Path) -> AsyncIterator[Running]:
    """Starts one way, in `folder`, and stops it; one on Serve has a Ray of its own."""
    processes = Processes()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=START_TIMEOUT_S, limits=limits)
        )
        if name in PLACEMENTS or name in RAY_EXAMPLES:
            base = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"][0]
            config = serve_config(base, str(model), device, name, port, folder)
            process = await stack.enter_async_context(application(config, threads, folder, http))
            processes.launches.append(process.pid)
            way: Way = Triptych(http) if name in PLACEMENTS else RayExample(http)
        elif name == "diffusers_server":
            command = ["benchmarks.rivals.diffusers_server", str(model), str(port), str(folder / "pictures"), device]
            process = await stack.enter_async_context(python(command, threads, folder))
            await until_ok(http, "/", process, folder)
            processes.by_pid[process.pid] = name
            way = DiffusersServer(http)
        else:
            own_threads = threads if name == "in_process" else os.cpu_count() or 1
            process = await stack.enter_async_context(
                python(["benchmarks.rivals.in_process", str(model), device], own_threads, folder)
            )
            assert process.stdout is not None
            if await process.stdout.readline() != b"ready\n":
                raise RuntimeError("the process with the pipeline did not start")
            processes.by_pid[process.pid] = name
            way = InProcess(process)
        yield Running(way, processes)


def serve_config(base: dict[str, Any], model: str, device: str, name: str, port: int, folder: Path) -> dict[str, Any]:
    """A Serve config file of one way; Triptych's settings are those of the file in ray_configs/."""
    if name in RAY_EXAMPLES:
        served = {
            "name": name,
            "import_path": "benchmarks.rivals.ray_example:build_app",
            "args": {"model": model, "device": device} | RAY_EXAMPLES[name],
        }
    else:
        served = triptych_application(base, model, device, name, folder)
    http_options = {"host": "127.0.0.1", "port": port}
    return {"http_options": http_options, "applications": [served | {"route_prefix": "/"}]}


def triptych_application(base: dict[str, Any], model: str, device: str, name: str, folder: Path) -> dict[str, Any]:
    share = 0.1  # Ray's bookkeeping only: all fit on the machine
    shares = {"num_cpus": share} | ({} if device == "cpu" else {"num_gpus": share})
    environment = base["runtime_env"]["env_vars"] | {"SGLANG_DIFFUSION_TARGET_DEVICE": device}
    args = {"model": model, "placement": name.removesuffix("_replicas"), "output_directory": str(folder / "pictures")}
    ingress: dict[str, Any] = {"name": "Ingress", "ray_actor_options": {"num_cpus": share}}
    stages = [
        {"name": stage, "ray_actor_options": shares}
        | ({"num_replicas": 2} if (name, stage) == ("three_stage_replicas", "Denoiser") else {})
        for stage in PLACEMENTS[name]
    ]
    return base | {
        "name": name,
        "args": base["args"] | args,
        "runtime_env": base["runtime_env"] | {"env_vars": environment},
        "deployments": [ingress, *stages],
    }


@contextlib.asynccontextmanager
async def application(
    config: dict[str, Any], threads: int, folder: Path, http: httpx.AsyncClient
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`serve run` as a user runs it."""
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    async with python(["serve_app.tools.launch", str(file)], threads, folder) as process:
        await until_ok(http, "/health", process, folder)
        yield process


@contextlib.asynccontextmanager
async def python(arguments: list[str], threads: int, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m ...` in `folder` with so many threads of arithmetic, ended afterwards."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",  # Ray gives its workers a lower priority than the other ways have
        "SGLANG_DIFFUSION_CACHE_ROOT": str(folder / "cache"),
    }
    with (folder / f"{arguments[0]}.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *arguments, cwd=folder, env=environment, stderr=log,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE if "in_process" in arguments[0] else log,
            limit=2**24,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def until_ok(http: httpx.AsyncClient, url: str, process: asyncio.subprocess.Process, folder: Path) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and process.returncode is None:
        with contextlib.suppress(httpx.HTTPError):
            if (await http.get(url, timeout=5)).status_code == 200:
                return
        await asyncio.sleep(1)
    raise RuntimeError(f"{url} did not become ready:\n{ends_of_logs(folder)}")


def ends_of_logs(folder: Path) -> str:
    return "\n".join(file.read_text(errors="replace")[-2000:] for file in sorted(folder.rglob("*.log")))


class Processes:
    """The processor time of all processes of the ways."""

    def __init__(self) -> None:
        self.by_pid: dict[int, str] = {os.getpid(): "client"}
        self.launches: list[int] = []

    def seconds(self) -> dict[str, float]:
        """User and system seconds since its start, by what the process is."""
        found: dict[str, float] = {}
        members: list[tuple[psutil.Process, str | None]] = [
            (psutil.Process(pid), name) for pid, name in self.by_pid.items()
        ]
        for pid in self.launches:
            for serve_run in psutil.Process(pid).children():
                members += [(each, None) for each in processes_of_session(serve_run.pid)]
        for process, name in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                label = name or role(" ".join(process.cmdline()))
                times = process.cpu_times()
                found[label] = found.get(label, 0.0) + times.user + times.system
        return found

    @staticmethod
    def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
        """Seconds between two looks; those of a process that ended in between are lost."""
        return {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}


def role(title: str) -> str:
    """`three_stage:Denoiser` for a replica, else which part of Ray the process with this command line is."""
    if title.startswith("ray::ServeReplica:"):
        application, deployment = re.split(r"[:.#\s]", title.removeprefix("ray::ServeReplica:"))[:2]
        return f"{application}:{deployment}"
    if title.startswith("ray::ProxyActor"):
        return "Serve's proxy"
    return "the rest of Ray"
