"""Groups of ranks without Ray: rank 0 is the test's own process, the others are processes beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deployments.devices import select_device
from deployments.engine.batching.axes import BatchAxes
from deployments.engine.executor import LocalExecutor
from deployments.memory.args import TileRanksArgs
from deployments.model import ModelArgs
from deployments.ranks.args import ParallelArgs
from deployments.ranks.executor import RanksExecutor
from deployments.ranks.group import RankGroup
from deployments.ranks.loss.lack import LackRecord
from deployments.ranks.member import Built, serve_rank
from deployments.ranks.place import Place
from deployments.ranks.tiles.spread import SpreadTiles, make_tiles
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import call_directly
from deployments.stages.build import build_stage
from deployments.stages.ranks.denoiser_rank import serve_denoiser_rank
from deployments.stages.ranks.vae_rank import group_args, serve_vae_rank, spread_tiles
from env_config.variables import EnvConfig
from tests.support.engine_parity import Stages
from tests.support.forked import forked_context
from tests.support.tiny_models import tiny_patches


class RankBeside:
    """A RankProcess: `run` and its arguments in a process of this machine."""

    def __init__(self, run: Callable[..., None], *args: Any) -> None:
        self.process = forked_context().Process(target=run, args=args, daemon=True)
        self.process.start()

    def end_reason(self) -> str | None:
        return None if self.process.exitcode is None else f"exit code {self.process.exitcode}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_denoiser_rank(place: Place, model: ModelArgs, variables: dict[str, str]) -> None:
    torch.set_num_threads(1)
    tiny_patches()
    serve_denoiser_rank(place, model, EnvConfig.from_environ({"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"} | variables))


def group_of(
    model: ModelArgs,
    variables: dict[str, str] | None = None,
    run: Callable[..., None] = run_denoiser_rank,
    record: LackRecord | None = None,
) -> RankGroup:
    """The ranks beside this process begin to load the model."""
    assert model.parallel is not None
    return RankGroup(model.parallel, lambda place: RankBeside(run, place, model, variables or {}), record=record)


@contextmanager
def stages_on_ranks(
    folder: Path,
    parallel: dict[str, Any],
    model: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
    run: Callable[..., None] = run_denoiser_rank,
    record: LackRecord | None = None,
    **denoising: Any,
) -> Iterator[Stages]:
    """An encoder stage, and a denoiser stage whose forwards ranks make; `model`: further ModelArgs. `run`: what the
    other ranks do."""
    served = ModelArgs(path=str(folder), name=folder.name, parallel=ParallelArgs(**parallel), **model or {})
    group = group_of(served, variables, run, record)
    stages = None
    try:
        precision = served.precision if isinstance(served.precision, str) else None
        stages = Stages(folder, variables, precision=precision, ranks=group, **denoising)
        yield stages
    finally:
        group.close()
        if stages is not None:
            stages.close()


Builders = dict[str, Callable[[], torch.nn.Module]]


def run_rank_of_modules(place: Place, builders: Builders) -> None:
    torch.set_num_threads(1)
    serve_rank(place, lambda: Built(built(builders), torch.device("cpu"), call_directly, lambda: None))


def built(builders: Builders) -> dict[str, torch.nn.Module]:
    return {name: build() for name, build in builders.items()}


@contextmanager
def modules_on_ranks(
    builders: Builders, axes: BatchAxes | None, record: LackRecord | None = None, **parallel: Any
) -> Iterator[tuple[RankGroup, RanksExecutor]]:
    """Modules by name on ranks, all with these batch axes."""
    args = ParallelArgs(**parallel)
    group = RankGroup(args, lambda place: RankBeside(run_rank_of_modules, place, builders), record=record)
    modules = built(builders)
    try:
        group.open(modules, torch.device("cpu"))
        yield group, RanksExecutor(group, LocalExecutor(call_directly), modules, lambda component: axes)
    finally:
        group.close()


@contextmanager
def toy_on_ranks(build: Callable[[], torch.nn.Module], **parallel: Any) -> Iterator[tuple[RankGroup, RanksExecutor]]:
    """A module named toy on ranks, with samples along the first axis of `x` and of what it returns."""
    with modules_on_ranks({"toy": build}, TOY_AXES, **parallel) as opened:
        yield opened


def run_tile_rank(place: Place, make: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    serve_rank(place, lambda: Built({"vae": make().decoder}, cpu, make_tiles(cpu), lambda: None))


@contextmanager
def tiles_on_ranks(make: Callable[[], Any], ranks: int = 2, **limits: Any) -> Iterator[tuple[Any, SpreadTiles]]:
    """An autoencoder whose tiles ranks decode; `make` is a function of a module, which makes the same one each time."""
    args = group_args(TileRanksArgs(ranks=ranks, **limits))
    group = RankGroup(args, lambda place: RankBeside(run_tile_rank, place, make))
    autoencoder, cpu = make(), torch.device("cpu")
    tiles = SpreadTiles(group, cpu)
    try:
        tiles.install("vae", autoencoder, lambda: make().to("meta"))
        group.open({"vae": autoencoder.decoder}, cpu)
        yield autoencoder, tiles
    finally:
        group.close()


def run_vae_rank(place: Place, model: ModelArgs) -> None:
    torch.set_num_threads(1)
    tiny_patches()
    serve_vae_rank(place, model, EnvConfig.from_environ({"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}))


@contextmanager
def vae_stage_on_ranks(model: ModelArgs) -> Iterator[tuple[StagePipeline, SpreadTiles]]:
    """The VAE stage of a replica, with the other ranks that its arguments ask for."""
    assert model.vae.parallel is not None
    group = RankGroup(group_args(model.vae.parallel), lambda place: RankBeside(run_vae_rank, place, model))
    try:
        stage = build_stage(model, ("vae",), EnvConfig(), select_device("cpu"))
        yield stage, spread_tiles(stage, group)
    finally:
        group.close()


TOY_AXES = BatchAxes({("x",): 0}, {(): 0})
