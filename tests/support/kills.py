"""Replicas of all stages are killed under load, and every request ends with the bytes of an undisturbed run.

The load on served applications goes through `serve_app.making.generate.generate`, as the ingress calls it, because
its progress tells when a denoiser is at an early, a middle or a late step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import signal
import time
import urllib.request
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from deployments.messages import DenoisingProgress, GenerationRequest, OutputFormat, StageDescription
from deployments.metrics.serve_meter import ServeMeter
from serve_app.making.follower import Follower
from serve_app.making.generate import generate
from serve_app.making.health import describe_stages
from serve_app.making.stages import Stages
from tests.support.served_application import CHECKPOINT_EVERY

STEPS = {"flux": 60, "wan22": 40}  # long enough to be hit at a chosen step
SIZES = {"flux": {"height": 32, "width": 32, "max_sequence_length": 32}, "wan22": {"height": 16, "width": 16}}
OUTPUTS = {"flux": OutputFormat("image", "png"), "wan22": OutputFormat("video", "mp4", fps=8.0)}
MOMENTS = {"early": 0.1, "middle": 0.5, "late": 0.8}  # of the steps of a request
PATIENCE_S = 300
FEWEST_HITS = 0.7  # of the kills of a denoiser, each of which waits until a request is at its moment
KILLS = [*(("Denoiser", moment) for moment in MOMENTS), ("Encoder", "any"), ("VAE", "any")]  # of one round


@dataclass
class Application:
    """One served model, its load, and what was seen of it."""

    name: str  # of the model
    stages: Stages
    truths: dict[int, bytes] = field(default_factory=dict)  # by seed
    under_way: dict[str, int] = field(default_factory=dict)  # request -> its last step
    finished: int = 0
    steps_run: int = 0
    passed: asyncio.Event = field(default_factory=asyncio.Event)  # a request has done a step

    def request(self, seed: int, attempt: int) -> GenerationRequest:
        arguments = {"prompt": f"a small cat {seed}", "num_inference_steps": STEPS[self.name], **SIZES[self.name]}
        if self.name == "wan22":
            arguments["num_frames"] = 5
        return GenerationRequest(
            f"{self.name}-{seed}-{attempt}", self.name, arguments, seed, OUTPUTS[self.name], deterministic=True
        )

    async def make(self, seed: int, attempt: int) -> bytes:
        request = self.request(seed, attempt)
        try:
            media = await generate(self.stages, request, _Steps(self, request.request_id))
        finally:
            self.under_way.pop(request.request_id, None)
        return media.files[0].data

    async def load(self, seeds: tuple[int, ...], stopped: asyncio.Event) -> None:
        """One request after another, each compared with the undisturbed run."""
        attempt = 0
        while not stopped.is_set():
            attempt += 1
            seed = seeds[attempt % len(seeds)]
            made = await self.make(seed, attempt)
            assert made == self.truths[seed], f"{self.name}: seed {seed} has other bytes"
            self.finished += 1

    async def until_a_request_passes(self, share: float) -> None:
        """Returns when a request is at that share of its steps, and not far beyond it."""
        first, last = share * STEPS[self.name], (share + 0.08) * STEPS[self.name]
        while not any(first <= step <= last for step in self.under_way.values()):
            self.passed.clear()
            await asyncio.wait_for(self.passed.wait(), PATIENCE_S)

    async def describe(self, deployment: str) -> StageDescription:
        """What the deployment holds, when all of the application is there."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            answers = await describe_stages(self.stages, timeout_s=10)
            answer = answers[deployment]
            if all(isinstance(each, StageDescription) for each in answers.values()):
                assert isinstance(answer, StageDescription)
                return answer
            assert time.monotonic() < give_up, answers
            await asyncio.sleep(0.2)


class _Steps(Follower):
    """Notes the steps of one request for its application."""

    wants_progress = True

    def __init__(self, application: Application, request_id: str) -> None:
        self.application = application
        self.request_id = request_id

    def on_progress(self, progress: DenoisingProgress) -> None:
        self.application.steps_run += 1
        self.application.under_way[self.request_id] = progress.step
        self.application.passed.set()


def check_kills(applications: list[Application], rounds: int, metrics_port: int) -> list[str]:
    """So many rounds of KILLS; every request ends with the bytes of an undisturbed run. Returns lines of figures."""
    began = time.monotonic()
    kills = KILLS * rounds
    hits = asyncio.run(kill_under_load(applications, kills, random.Random(0)))
    figures = [
        f"{len(kills)} kills in {time.monotonic() - began:.0f} s",
        *(f"{app.name}: {app.finished} requests, {app.steps_run} steps seen" for app in applications),
    ]
    metrics = wait_for_metrics(metrics_port, ("triptych_recoveries", "triptych_resumes", "triptych_step_seconds"))
    figures += [f"{name}: {value:g}" for name, value in {**hits, **metrics}.items()]
    assert all(app.finished >= 2 for app in applications), "each of the two callers got on"
    assert hits["recoveries"] >= FEWEST_HITS * rounds * len(MOMENTS)
    assert hits["extra_steps"] <= CHECKPOINT_EVERY * hits["recoveries"]
    return figures


def stages_of(name: str, owner: str = "") -> Stages:
    encoder, denoiser, vae = (serve.get_deployment_handle(stage, name) for stage in ("Encoder", "Denoiser", "VAE"))
    return Stages(encoder, denoiser, vae, owner, meter=ServeMeter())


async def kill_under_load(
    applications: list[Application], moments: list[tuple[str, str]], choice: random.Random
) -> dict[str, int]:
    for application in applications:
        for seed in (1, 2):
            application.truths[seed] = await application.make(seed, 0)
    watched = RecoveryLog()
    stopped = asyncio.Event()
    loads = [asyncio.create_task(app.load((1, 2), stopped)) for app in applications for _ in range(2)]
    kills = [(deployment, moment, applications[i % 2]) for i, (deployment, moment) in enumerate(moments)]
    choice.shuffle(kills)
    with watched:
        for deployment, moment, application in kills:
            process_id = (await application.describe(deployment)).process_id
            if moment in MOMENTS:
                await wait_beside(loads, application.until_a_request_passes(MOMENTS[moment]))
            else:
                await asyncio.sleep(choice.uniform(0, 0.5))
            os.kill(process_id, signal.SIGKILL)
            assert not any(load.done() for load in loads), [load.exception() for load in loads if load.done()]
        stopped.set()
        await asyncio.wait_for(asyncio.gather(*loads), PATIENCE_S)
    return {"recoveries": watched.recoveries, "extra_steps": watched.lost_steps}


async def wait_beside(loads: list[asyncio.Task[None]], waiting: Coroutine[Any, Any, None]) -> None:
    """Waits, but not if the load has failed meanwhile."""
    wait = asyncio.create_task(waiting)
    await asyncio.wait([wait, *loads], return_when=asyncio.FIRST_COMPLETED)
    for load in loads:
        if load.done():
            load.result()
    await wait


class RecoveryLog(logging.Handler):
    """Counts what the path of a request logs when a replica dies under it."""

    def __init__(self) -> None:
        super().__init__()
        self.recoveries = 0
        self.lost_steps = 0
        self._logger = logging.getLogger("serve_app.making.generate")

    def emit(self, record: logging.LogRecord) -> None:
        lost = re.search(r"going on from step \d+ \((\d+) steps lost\)", record.getMessage())
        if lost:
            self.recoveries += 1
            self.lost_steps += int(lost[1])

    def __enter__(self) -> RecoveryLog:
        self._logger.addHandler(self)
        self._level_before = self._logger.level
        self._logger.setLevel(logging.INFO)  # also where the caller has silenced the rest
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level_before)
        self._logger.removeHandler(self)


def wait_for_metrics(port: int, names: tuple[str, ...]) -> dict[str, float]:
    """The sums of these metrics over all processes, as Prometheus would read them."""
    give_up = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        sums = {
            name: sum(
                float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"ray_{name}(_total|_count)?[{{ ]", line)
            )
            for name in names
        }
        if all(sums.values()):
            return sums
        assert time.monotonic() < give_up, sums
        time.sleep(1)
