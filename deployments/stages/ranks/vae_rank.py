"""A VAE stage whose tiles several ranks decode: how rank 0 spreads them, and what each other rank builds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from deployments.devices import Device, select_device
from deployments.memory.args import TileRanksArgs
from deployments.memory.switches import abilities_of
from deployments.model import ModelArgs
from deployments.modules import AccelerationError
from deployments.ranks.args import ParallelArgs
from deployments.ranks.group import RankGroup
from deployments.ranks.member import Built, serve_rank
from deployments.ranks.place import Place
from deployments.ranks.tiles.recording import NotSpreadError
from deployments.ranks.tiles.spread import DECODER, SpreadTiles, make_tiles
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.own_modules import is_rewired
from deployments.stage_pipeline.skeleton import meta_twin_maker
from deployments.stages.build import build_stage
from deployments.weights.precision.computing import dtype_computed_in
from env_config.variables import EnvConfig

HOST = torch.device("cpu")  # what the ranks send each other is there, whatever device they compute on


def group_args(args: TileRanksArgs) -> ParallelArgs:
    """Each rank is a whole: tiles are shared out as samples are."""
    return ParallelArgs(
        batch=args.ranks,
        collective_timeout_s=args.answer_timeout_s,
        silence_timeout_s=args.silence_timeout_s,
        start_timeout_s=args.start_timeout_s,
    )


def serve_vae_rank(place: Place, model: ModelArgs, env: EnvConfig) -> None:
    """Until rank 0 is gone; raises what `build_stage` and `select_device` raise."""
    serve_rank(place, lambda: built(model, env, select_device(env.runtime.target_device)))


def built(model: ModelArgs, env: EnvConfig, device: Device) -> Built:
    """The decoders alone, by the names of their autoencoders."""
    stage = build_stage(model, ("vae",), env, device)
    decoders = {name: getattr(module, DECODER) for name, module in tiled_autoencoders(stage).items()}
    return Built(decoders, HOST, make_tiles(stage.device), stage.memory.give_back)


def spread_tiles(stage: StagePipeline, group: RankGroup) -> SpreadTiles:
    """Waits for the other ranks; from now on all decode the tiles of this stage's autoencoders.

    Raises AccelerationError where none has tiles or those of one depend on each other, and for a rank that cannot
    start.
    """
    tiles = SpreadTiles(group, stage.device, is_rewired)
    decoders = {}
    try:
        for name, module in tiled_autoencoders(stage).items():
            cls, folder = stage.layout.models[name], stage.layout.folder / name
            try:
                tiles.install(name, module, meta_twin_maker(module, cls, folder, dtype_computed_in(module)))
            except NotSpreadError as error:
                raise AccelerationError(
                    f"vae.parallel: {group.args.size} is not possible for {name}, {cls.__name__}: {error}. Leave it out"
                ) from error
            decoders[name] = getattr(module, DECODER)
        if not decoders:
            raise AccelerationError(
                f"vae.parallel: {group.args.size} is not possible: no autoencoder of the pipeline decodes tiles by "
                f"calls of its `{DECODER}`. Leave it out"
            )
        group.open(decoders, HOST)
    except BaseException:
        group.close()
        raise
    stage.memory.when_lacking(tiles.free)
    return tiles


def tiled_autoencoders(stage: StagePipeline) -> Mapping[str, torch.nn.Module]:
    """Those of a stage that know tiles, by their names."""
    return {
        name: module
        for name, module in stage.components.items()
        if name in stage.layout.autoencoders
        and abilities_of(type(module)).tiling
        and isinstance(getattr(module, DECODER, None), torch.nn.Module)
    }
