"""A served denoiser that is a group of two ranks: each of them is killed at an early and at a late step, and stopped;
every request ends with the bytes of an undisturbed run."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve

from serve_app.making.stages import Stages
from tests.support.kills import Application
from tests.support.served_application import TWO_STAGE, ServedApplication, application, serve_application

# Ray warns of its own affairs (sockets, forks) in a process that joins it.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.filterwarnings("default")]

SILENCE_S = 5
SEED = 1
MOMENTS = {"early": 0.1, "late": 0.8}


@pytest.fixture(scope="module")
def ranks(flux_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApplication]:
    folder = tmp_path_factory.mktemp("ranks")
    config = application(
        "triptych",
        flux_checkpoint,
        TWO_STAGE,
        folder,
        placement="two_stage",
        denoising={"checkpoint_every": 1},
        parallel={"ulysses": 2, "silence_timeout_s": SILENCE_S},
    )
    [denoiser] = [each for each in config["deployments"] if each["name"] == "Denoiser"]
    denoiser["placement_group_bundles"] = [{"CPU": 0.1}, {"CPU": 0.1}]
    with serve_application(config, folder) as served:
        ray.init(address=served.ray_address(), log_to_driver=False)
        try:
            yield served
        finally:
            ray.shutdown()


def app_of() -> Application:
    both, denoiser = (serve.get_deployment_handle(name, "triptych") for name in ("EncoderVAE", "Denoiser"))
    return Application("flux", Stages(both, denoiser, both))


def rank_process(served: ServedApplication, rank: int) -> psutil.Process:
    """Rank 0 is the replica, rank 1 its actor."""
    title = "ray::ServeReplica:triptych:Denoiser" if rank == 0 else "ray::RankActor"
    give_up = time.monotonic() + 280
    while time.monotonic() < give_up:
        found = [each for each in served.processes() if each.is_running() and title in " ".join(each.cmdline()[:1])]
        if len(found) == 1:
            return found[0]
        time.sleep(0.5)
    raise AssertionError(f"no rank {rank}")


async def harmed(app: Application, served: ServedApplication, rank: int, moment: float, sign: int) -> float:
    """The seconds that the request took after the harm."""
    making = asyncio.create_task(app.make(SEED, 1))
    await app.until_a_request_passes(moment)
    began = time.monotonic()
    rank_process(served, rank).send_signal(sign)
    assert await making == app.truths[SEED]
    return time.monotonic() - began


def test_each_rank_may_die_or_stop_at_any_step(ranks: ServedApplication, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [(rank, name, signal.SIGKILL) for name in MOMENTS for rank in (0, 1)]
    cases += [(1, "early", signal.SIGSTOP)]

    async def check() -> list[str]:
        app = app_of()
        app.truths[SEED] = await app.make(SEED, 0)
        lines = []
        for rank, name, sign in cases:
            steps = app.steps_run
            seconds = await harmed(app, ranks, rank, MOMENTS[name], sign)
            lines.append(f"rank {rank}, {name}, {sign.name}: {seconds:.0f} s, {app.steps_run - steps} steps")
            await app.describe("Denoiser")
        return lines

    lines = asyncio.run(check())
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    ranks.wait_until_healthy()
    assert len([each for each in ranks.processes() if "RankActor" in " ".join(each.cmdline()[:1])]) == 1
