"""What a `kill -9` of a replica costs the request that it works on.

    python -m benchmarks.recovery [--rounds N] [--replicas N ...]

On an accelerator, with a checkpoint of real size (benchmarks/real_size.py):

    python -m benchmarks.recovery --model FOLDER --device cuda --side 1024

The denoiser is killed at an early, a middle and a late step, with a spare replica and without one (a fresh one must
start), and with checkpoints and without (the request starts over, as on a server that has none); the encoder
and the VAE are killed at their work. The requests go through `serve_app.making.generate.generate`, as from the
ingress, on a Ray of their own; each is made undisturbed first, and must have the same bytes after the kill.
Writes docs/benchmarks/recovery.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.served import ONE_THREAD

os.environ.update(ONE_THREAD)  # before Ray starts workers

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from benchmarks import report
from benchmarks.recovery_rows import Run, as_table, summarize
from benchmarks.scale_validation import ROOT
from deployments.messages import DenoisingProgress, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs, ModelArgs
from deployments.replicas.table import bind_stages
from serve_app.making.follower import Follower
from serve_app.making.generate import generate
from serve_app.making.stages import Stages
from tests.support.kills import MOMENTS, RecoveryLog, stages_of

EMOJI = ROOT / "checkpoints" / "emoji-flux"
STEPS = 30
NEVER = 1_000_000  # steps between checkpoints
PATIENCE_S = 300
POLL_S = 0.002
TRIES = 10  # to meet an encoder or a VAE at its work
SHARE = 0.1  # of an accelerator: Ray's bookkeeping, all fit on one
NUMBERS = itertools.count()  # of requests
AT_WORK = ("Encoder", "VAE")


@dataclass(frozen=True)
class Kill:
    deployment: str
    moment: str  # a key of MOMENTS, or "at work"


@dataclass(frozen=True)
class Setting:
    """What is served, where, and what is asked for."""

    model: Path
    device: str
    side: int  # of the picture, in pixels

    @property
    def arguments(self) -> dict[str, Any]:
        return {"height": self.side, "width": self.side, "max_sequence_length": 128, "num_inference_steps": STEPS}


@dataclass
class Application:
    name: str
    setting: Setting
    stages: Stages
    replicas: dict[str, int]
    has_checkpoints: bool

    def handle(self, deployment: str) -> DeploymentHandle:
        return self.stages.deployments()[deployment]


@dataclass
class Course(Follower):
    """One request as its caller sees it; times are time.perf_counter()."""

    wants_progress = True

    request: GenerationRequest
    began: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    steps: list[tuple[float, int]] = field(default_factory=list)
    passed: asyncio.Event = field(default_factory=asyncio.Event)

    def on_progress(self, progress: DenoisingProgress) -> None:
        self.steps.append((time.perf_counter(), progress.step))
        self.passed.set()

    async def until_step(self, step: int) -> None:
        while not self.steps or self.steps[-1][1] < step:
            self.passed.clear()
            await asyncio.wait_for(self.passed.wait(), PATIENCE_S)


class TimedRecoveryLog(RecoveryLog):
    """Also notes when the first death was noticed."""

    def __init__(self) -> None:
        super().__init__()
        self.noticed: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        before = self.recoveries
        super().emit(record)
        if self.noticed is None and self.recoveries > before:
            self.noticed = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="kills of each kind")
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 1], help="of each stage that is killed")
    parser.add_argument("--model", type=Path, default=EMOJI, help="a checkpoint folder of FLUX's kind")
    parser.add_argument("--device", default="cpu", help="of the stages, such as cuda")
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    options = parser.parse_args()
    setting = Setting(options.model.resolve(), options.device, options.side)
    runs: list[Run] = []
    with own_ray(2 + max(options.replicas), options.device):
        for replicas, has_checkpoints, kills in applications(options.replicas):
            runs += asyncio.run(kill_all(setting, replicas, has_checkpoints, kills, options.rounds))
            result = {  # written after each application: a run that is ended early leaves what it has measured
                "machine": report.machine(),
                "model": setting.model.name,
                "device": setting.device,
                "steps": STEPS,
                "rounds": options.rounds,
                "rows": summarize(runs),
                "runs": [asdict(run) for run in runs],
            }
            report.write("recovery", result, as_markdown(result))


def applications(replicas: Sequence[int]) -> Iterator[tuple[dict[str, int], bool, list[Kill]]]:
    """What is served, whether it makes checkpoints, and who is killed."""
    for number, has_checkpoints in itertools.product(replicas, (True, False)):
        yield {"Denoiser": number}, has_checkpoints, [Kill("Denoiser", moment) for moment in MOMENTS]
    for number, deployment in itertools.product(replicas, AT_WORK):
        yield {deployment: number}, True, [Kill(deployment, "at work")]


@contextmanager
def own_ray(num_cpus: int, device: str) -> Iterator[None]:
    """Ray and Serve with nothing on them, without a proxy."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets in it have 107 characters
    os.environ |= {
        "PYTHONPATH": str(ROOT),
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # it would kill replicas of its own choice
        "RAY_AUTH_MODE": "disabled",
        "SGLANG_DIFFUSION_TARGET_DEVICE": device,
        "SGLANG_DIFFUSION_CACHE_ROOT": folder,
    }
    try:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            object_store_memory=200_000_000,
        )
        serve.start(proxy_location="Disabled")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


async def kill_all(
    setting: Setting, replicas: dict[str, int], has_checkpoints: bool, kills: list[Kill], rounds: int
) -> list[Run]:
    """All `kills` in each of the rounds, at one application that is made for them; `replicas` where not one."""
    application = await asyncio.to_thread(run_application, setting, replicas, has_checkpoints)
    try:
        for seed in (1, 2):
            await undisturbed(application, seed)  # warms up
        runs = []
        for number, kill in itertools.product(range(rounds), kills):
            run = await one_kill(application, kill, seed=number)
            print(run, flush=True)
            runs.append(run)
        return runs
    finally:
        await asyncio.to_thread(serve.delete, application.name)


def run_application(setting: Setting, replicas: dict[str, int], has_checkpoints: bool) -> Application:
    """The three stages of the model; this process is the caller."""
    name = "-".join([*(f"{key}{value}" for key, value in replicas.items()), str(has_checkpoints)]).lower()
    denoising = DenoisingArgs(deterministic=True, checkpoint_every=None if has_checkpoints else NEVER)
    model = ModelArgs(path=str(setting.model), name=setting.model.name, denoising=denoising)
    resources = {} if setting.device == "cpu" else {"ray_actor_options": {"num_gpus": SHARE}}

    names = ("Encoder", "Denoiser", "VAE")
    options = {each: {"num_replicas": replicas.get(each, 1), **resources} for each in names}
    _, denoiser, _ = bind_stages(model, names, options)
    serve.run(denoiser, name=name, route_prefix=None)
    return Application(name, setting, stages_of(name), replicas, has_checkpoints)


async def one_kill(application: Application, kill: Kill, seed: int) -> Run:
    """Raises RuntimeError if the bytes are others after it, or if it met no replica at work in TRIES requests."""
    replicas = application.replicas.get(kill.deployment, 1)
    for _ in range(TRIES):
        alone, truth = await undisturbed(application, seed)
        course = new_course(application.setting, seed)
        with TimedRecoveryLog() as log:
            assert isinstance(log, TimedRecoveryLog)
            task = asyncio.create_task(make(application, course))
            process_id = await replica_at_work(application, course, kill)
            if process_id is not None:
                os.kill(process_id, signal.SIGKILL)
            killed = time.perf_counter()
            made = await asyncio.wait_for(task, PATIENCE_S)
        if process_id is not None:
            await wait_until_whole(application, kill.deployment, replicas, process_id)
            whole_s = time.perf_counter() - killed
            if made != truth:
                raise RuntimeError(f"{kill}: the request has other bytes than undisturbed")
        if process_id is None or log.noticed is None:
            continue  # its work was done before
        return Run(
            kill.deployment,
            kill.moment,
            replicas,
            application.has_checkpoints,
            alone_s=alone.ended - alone.began,
            total_s=course.ended - course.began,
            killed_at_s=killed - course.began,
            noticed_s=log.noticed - killed,
            next_step_s=next((time_s - killed for time_s, _ in course.steps if time_s > log.noticed), None),
            extra_steps=log.lost_steps,
            whole_s=whole_s,
        )
    raise RuntimeError(f"{kill}: no replica was met at its work in {TRIES} requests")


async def undisturbed(application: Application, seed: int) -> tuple[Course, bytes]:
    course = new_course(application.setting, seed)
    return course, await make(application, course)


def new_course(setting: Setting, seed: int) -> Course:
    arguments = {"prompt": "a big fox on an orange background", **setting.arguments}
    name = f"recovery-{next(NUMBERS)}"
    return Course(
        GenerationRequest(name, setting.model.name, arguments, seed, OutputFormat("image", "png"), deterministic=True)
    )


async def make(application: Application, course: Course) -> bytes:
    media = await generate(application.stages, course.request, course)
    course.ended = time.perf_counter()
    return media.files[0].data


async def replica_at_work(application: Application, course: Course, kill: Kill) -> int | None:
    """The process that works on the request at that moment; None if the moment has passed."""
    handle = application.handle(kill.deployment)
    if kill.moment in MOMENTS:
        await course.until_step(1)
        process_id = await process_of(handle, course.request.request_id)
        await course.until_step(round(MOMENTS[kill.moment] * STEPS))
        return process_id
    if kill.deployment == "VAE":
        await course.until_step(STEPS - 1)
    while not course.ended and (kill.deployment != "Encoder" or not course.steps):
        process_id = await process_of(handle, course.request.request_id)
        if process_id is not None:
            return process_id
        await asyncio.sleep(POLL_S)
    return None


async def process_of(handle: DeploymentHandle, request_id: str) -> int | None:
    """The process of the replica that has the request now."""
    for replica in await handle.broadcast("inspect").results_async(timeout_s=PATIENCE_S):
        if any(request["request_id"] == request_id for request in replica["requests"]):
            return int(replica["process_id"])
    return None


async def wait_until_whole(application: Application, deployment: str, replicas: int, killed: int) -> None:
    """Until so many living replicas answer."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        try:
            answers = await application.handle(deployment).broadcast("describe").results_async(timeout_s=10)
            processes = {answer.process_id for answer in answers} - {killed}
        except (RayError, TimeoutError):
            processes = set()
        if len(processes) == replicas:
            return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"{deployment}: not {replicas} replicas {PATIENCE_S} s after a kill")


def as_markdown(result: dict[str, Any]) -> list[str]:
    machine = result["machine"]
    return [
        f"# Kills of replicas (`kill -9`, {machine['cores']} cores, load average {machine['load_average'][0]:.1f})",
        "",
        f"`python -m benchmarks.recovery`: requests of {result['steps']} steps of {result['model']} on "
        f"{result['device']}, medians of "
        f"{result['rounds']}, each against the same request undisturbed just before; the bytes were the same. With "
        "two replicas the other goes on; with one, a fresh one must start (a process, imports of torch and "
        "diffusers, weights). Without checkpoints: the same kills where none are made, so that the request starts "
        "over. Encoder and VAE work is done again from its start.",
        "",
        *as_table(result["rows"]),
    ]


if __name__ == "__main__":
    main()
