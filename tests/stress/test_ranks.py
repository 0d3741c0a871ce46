"""A served denoiser that is a group of two ranks, on one node and on two: each of them is killed at an early, a middle
and a late step, and stopped; every request ends with the bytes of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve

from serve_app.making.stages import Stages
from serve_app.tools.launch import processes_of_session
from tests.support.forking.command import forks_in
from tests.support.kills import MOMENTS, Application
from tests.support.served_application import (
    TWO_STAGE,
    ServedApplication,
    application,
    environment,
    serve_application,
    sessions_of,
)

# Ray warns of its own affairs (sockets, forks) in a process that joins it.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.filterwarnings("default")]

SILENCE_S = 5
SEED = 1
PATIENCE_S = 280
HARMS = [(rank, name, signal.SIGKILL) for name in MOMENTS for rank in (0, 1)]
HARMS += [(rank, "early", signal.SIGSTOP) for rank in (0, 1)]


@pytest.fixture(scope="module")
def served(flux_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApplication]:
    folder = tmp_path_factory.mktemp("ranks")
    with serve_application(entry("triptych", flux_checkpoint, folder, "PACK"), folder) as served:
        ray.init(address=served.ray_address(), log_to_driver=False)
        try:
            yield served
        finally:
            ray.shutdown()


def entry(name: str, checkpoint: Path, folder: Path, strategy: str) -> dict[str, Any]:
    config = application(
        name,
        checkpoint,
        TWO_STAGE,
        folder,
        placement="two_stage",
        denoising={"checkpoint_every": 1},
        parallel={"ulysses": 2, "silence_timeout_s": SILENCE_S},
    )
    [denoiser] = [each for each in config["deployments"] if each["name"] == "Denoiser"]
    denoiser |= {"placement_group_bundles": [{"CPU": 0.1}] * 2, "placement_group_strategy": strategy}
    return config


@contextmanager
def further_node(served: ServedApplication) -> Iterator[int]:
    """Another one of this Ray. Gives the session of its processes."""
    folder = served.folder / "second"
    folder.mkdir()
    node = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", served.ray_address()],
        env=environment(folder) | forks_in(folder),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield node.pid
    finally:
        node.send_signal(signal.SIGINT)
        node.wait(60)


@dataclass(frozen=True)
class Group:
    """The ranks of one application, in the sessions of its nodes; `others` are rank 1 of other groups."""

    name: str
    sessions: tuple[int, ...]
    others: frozenset[int] = frozenset()

    def process(self, rank: int) -> psutil.Process:
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            if len(found := self.processes(rank)) == 1:
                return found[0]
            time.sleep(0.5)
        raise AssertionError(f"no rank {rank}")

    def processes(self, rank: int) -> list[psutil.Process]:
        """Rank 0 is the replica, rank 1 its actor."""
        title = f"ray::ServeReplica:{self.name}:Denoiser" if rank == 0 else "ray::RankActor"
        all_of_them = [each for session in self.sessions for each in processes_of_session(session)]
        return [each for each in all_of_them if each.pid not in self.others and is_titled(each, title)]


def is_titled(process: psutil.Process, title: str) -> bool:
    try:
        return title in " ".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return False


async def all_harms(group: Group) -> list[str]:
    """One request at a time. Returns a line of figures for each."""
    both, denoiser = (serve.get_deployment_handle(each, group.name) for each in ("EncoderVAE", "Denoiser"))
    app = Application("flux", Stages(both, denoiser, both))
    app.truths[SEED] = await app.make(SEED, 0)
    lines = []
    for attempt, (rank, moment, sign) in enumerate(HARMS, start=1):
        steps = app.steps_run
        making = asyncio.create_task(app.make(SEED, attempt))
        await app.until_a_request_passes(MOMENTS[moment])
        began = time.monotonic()
        group.process(rank).send_signal(sign)
        assert await making == app.truths[SEED]
        lines.append(
            f"rank {rank}, {moment}, {sign.name}: {time.monotonic() - began:.0f} s, {app.steps_run - steps} steps"
        )
        await app.describe("Denoiser")
    return lines


def test_each_rank_may_die_or_stop_at_any_step(served: ServedApplication) -> None:
    [session] = sessions_of(served.launcher)
    group = Group("triptych", (session,))
    print("\n".join(asyncio.run(all_harms(group))))
    group.process(1)  # one is left
    served.wait_until_healthy()


def test_ranks_on_two_nodes_may_die_as_well(served: ServedApplication, flux_checkpoint: Path) -> None:
    [session] = sessions_of(served.launcher)
    others = frozenset(each.pid for each in Group("triptych", (session,)).processes(1))
    apart = entry("apart", flux_checkpoint, served.folder, "STRICT_SPREAD")
    with further_node(served) as second, served.beside(apart):
        served.wait_until_healthy("/apart")
        ranks = Group("apart", (session, second), others)
        assert len({os.getsid(ranks.process(rank).pid) for rank in (0, 1)}) == 2
        print("\n".join(asyncio.run(all_harms(ranks))))
