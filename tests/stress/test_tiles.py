"""A served VAE that is a group of two ranks: each of them is killed, and every request ends with the same bytes."""

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

SEED = 1
TITLES = ("ray::ServeReplica:triptych:EncoderVAE", "ray::RankActor")  # of rank 0 and of rank 1


@pytest.fixture(scope="module")
def tiles(flux_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApplication]:
    folder = tmp_path_factory.mktemp("tiles")
    vae = {"tiling": "on", "tile": {"tile_sample_min_size": 8}, "parallel": {"ranks": 2, "silence_timeout_s": 5}}
    config = application("triptych", flux_checkpoint, TWO_STAGE, folder, placement="two_stage", vae=vae)
    [both] = [each for each in config["deployments"] if each["name"] == "EncoderVAE"]
    both["placement_group_bundles"] = [{"CPU": 0.1}, {"CPU": 0.1}]
    with serve_application(config, folder) as served:
        ray.init(address=served.ray_address(), log_to_driver=False)
        try:
            yield served
        finally:
            ray.shutdown()


def rank_process(served: ServedApplication, rank: int) -> psutil.Process:
    give_up = time.monotonic() + 280
    while time.monotonic() < give_up:
        titled = {each.pid: each for each in served.processes() if parent_of(each, TITLES[rank]) is not None}
        found = [each for each in titled.values() if parent_of(each, TITLES[rank]) not in {None, *titled}]
        if len(found) == 1:
            return found[0]
        time.sleep(0.5)
    raise AssertionError(f"no rank {rank}")


def parent_of(process: psutil.Process, title: str) -> int | None:
    """None: it is not titled so, or gone. What a replica has forked is titled as the replica."""
    try:
        return process.ppid() if title in " ".join(process.cmdline()[:1]) else None
    except psutil.Error:
        return None


def test_each_rank_may_die(tiles: ServedApplication, capsys: pytest.CaptureFixture[str]) -> None:
    both, denoiser = (serve.get_deployment_handle(name, "triptych") for name in ("EncoderVAE", "Denoiser"))
    app = Application("flux", Stages(both, denoiser, both))

    async def check() -> list[str]:
        truth, lines = await app.make(SEED, 0), []
        for rank in (1, 0):
            began = time.monotonic()
            rank_process(tiles, rank).send_signal(signal.SIGKILL)
            assert await app.make(SEED, 0) == truth
            lines.append(f"rank {rank} was killed: the next request took {time.monotonic() - began:.0f} s")
            tiles.wait_until_healthy()
        return lines

    lines = asyncio.run(check())
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert rank_process(tiles, 1).is_running(), "the replica that came in place of the other has ranks too"
