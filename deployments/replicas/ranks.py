"""The other ranks of a replica: actors in its own placement group, which end with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.accelerators import bundles_problem
from deployments.devices import select_device
from deployments.lacks import LacksOfDeployment
from deployments.messages import StageName
from deployments.model import ModelArgs
from deployments.modules import AccelerationError
from deployments.observability.logging_setup import apply_logging_level
from deployments.ranks.args import ParallelArgs
from deployments.ranks.group import RankGroup
from deployments.ranks.place import Place
from deployments.replicas.device_share import claim_share
from deployments.stages.ranks.denoiser_rank import serve_denoiser_rank
from deployments.stages.ranks.vae_rank import group_args, serve_vae_rank
from env_config.library_caches import check_cache_root, set_allocator_settings, set_library_caches
from env_config.variables import EnvConfig

# What a rank other than 0 does, by the stage that the ranks compute.
SERVES: dict[StageName, Callable[[Place, ModelArgs, EnvConfig], None]] = {
    "denoiser": serve_denoiser_rank,
    "vae": serve_vae_rank,
}
HERE = "127.0.0.1"  # where all ranks are on this node, nobody else can reach their store


class RankActor:
    """One rank; it inherits the variables of the replica."""

    def about(self) -> tuple[str, int]:
        """Its node and its process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def serve(self, place: Place, model: ModelArgs, stage: StageName) -> None:
        """Until rank 0 is gone."""
        env = EnvConfig.from_environ()
        check_cache_root(env.runtime.cache_root)
        set_library_caches(env.runtime.cache_root)
        set_allocator_settings(env.runtime.target_device)
        apply_logging_level(env.runtime.logging_level)
        device = select_device(env.runtime.target_device)
        claim_share(device, ray.get_runtime_context().get_assigned_resources(), model.fence_device_memory)
        SERVES[stage](place, model, env)


class RankInActor:
    """A RankProcess."""

    def __init__(
        self, place: Place, model: ModelArgs, stage: StageName, group: Any, bundle: Mapping[str, float]
    ) -> None:
        others = {name: share for name, share in bundle.items() if name not in ("CPU", "GPU", "memory")}
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place.rank)
        self._actor = (
            ray.remote(RankActor)
            .options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                resources=others,
                scheduling_strategy=strategy,
            )
            .remote()
        )
        self._about = self._actor.about.remote()
        self._served = self._actor.serve.remote(place, model, stage)

    def end_reason(self) -> str | None:
        ended, _ = ray.wait([self._served], timeout=0)
        if not ended:
            return None
        try:
            ray.get(self._served)
        except RayError as error:
            return str(error).strip().splitlines()[-1]
        return "it has left"

    def kill(self) -> None:
        """Ray asks the process to end, which a stopped one does not hear: on this node it is killed."""
        with suppress(RayError):
            ray.kill(self._actor)
        ready, _ = ray.wait([self._about], timeout=0)
        with suppress(RayError, ProcessLookupError, PermissionError):
            if ready:
                node, process = ray.get(self._about)
                if node == ray.get_runtime_context().get_node_id():
                    os.kill(process, signal.SIGKILL)


@dataclass(frozen=True)
class Ranks:
    """The group of a replica, and which of its stages the ranks compute."""

    stage: StageName
    group: RankGroup

    def of(self, stage: StageName) -> RankGroup | None:
        return self.group if stage == self.stage else None


def start_ranks(model: ModelArgs, device: str, stages: Sequence[StageName]) -> Ranks | None:
    """The group of this replica, whose other ranks begin to load; None: one process computes alone.

    Raises AccelerationError for a placement group that does not fit the arguments, and for two groups in a process.
    """
    asked = asked_ranks(model, stages)
    if not asked:
        return None
    if len(asked) > 1:
        raise AccelerationError(f"{' and '.join(each.setting for each in asked)}: a process has one group of ranks")
    (wanted,) = asked
    group = ray.util.get_current_placement_group()
    bundles = tuple(group.bundle_specs) if group is not None else ()
    problem = bundles_problem(device, bundles, wanted.args.size, wanted.setting)
    if problem is not None:
        raise AccelerationError(problem)
    context = serve.get_replica_context()
    lacks = LacksOfDeployment(context.app_name, context.deployment, model.version)
    started = RankGroup(
        wanted.args,
        lambda place: RankInActor(place, model, wanted.stage, group, bundles[place.rank]),
        address_for_ranks(group),
        lacks if wanted.stage == "denoiser" else None,  # what a rank has no memory to decode, rank 0 decodes
        wanted.setting,
    )
    return Ranks(wanted.stage, started)


@dataclass(frozen=True)
class AskedRanks:
    """`setting`: what of the model's arguments asks for them."""

    setting: str
    stage: StageName
    args: ParallelArgs


def asked_ranks(model: ModelArgs, stages: Sequence[StageName]) -> list[AskedRanks]:
    """What a process of these stages is to have."""
    found = []
    if model.parallel is not None and "denoiser" in stages:
        found.append(AskedRanks("parallel", "denoiser", model.parallel))
    if model.vae.parallel is not None and "vae" in stages:
        found.append(AskedRanks("vae.parallel", "vae", group_args(model.vae.parallel)))
    return found


def address_for_ranks(group: Any) -> str:
    """At which all ranks reach this process."""
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return HERE if len(set(nodes.values())) == 1 else str(ray.util.get_node_ip_address())
