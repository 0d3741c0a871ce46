"""A rank other than 0 of a denoiser stage: it builds the denoisers as a replica does, and nothing else."""

from __future__ import annotations

import logging

from deployments.devices import Device, select_device
from deployments.model import ModelArgs
from deployments.ranks.member import Built, serve_rank
from deployments.ranks.place import Place
from deployments.stage_pipeline.sessions.denoise import call_directly
from deployments.stages.adapters import preload
from deployments.stages.build import build_stage
from deployments.stages.ranks.adapters import PATIENCE_S, AdaptersOfRank
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

SHARE_OF_LIMITS = 0.25  # what a question for LoRAs may take of the time after which somebody gives the group up


def serve_denoiser_rank(place: Place, model: ModelArgs, env: EnvConfig) -> None:
    """Until rank 0 is gone; raises what `build_stage` and `select_device` raise."""
    serve_rank(place, lambda: built(model, env, select_device(env.runtime.target_device)))


def built(model: ModelArgs, env: EnvConfig, device: Device) -> Built:
    """The denoisers alone, whatever else rank 0 has."""
    stage = build_stage(model, ("denoiser",), env, device)
    modules = {name: stage.components[name] for name in stage.layout.denoisers if name in stage.components}
    for line in preload(stage, model):
        logger.info("%s", line)
    adapters = AdaptersOfRank(stage.adapters, tuple(modules.values()), patience_s(model))
    return Built(modules, stage.device, call_directly, stage.memory.give_back, adapters)


def patience_s(model: ModelArgs) -> float:
    """For LoRAs that are new: rank 0 makes no forward meanwhile, which its watchdog and its own wait look at."""
    watchdog, parallel = model.watchdog, model.parallel
    limits = [watchdog.forward_timeout_s, watchdog.usual_timeout_s, parallel and parallel.collective_timeout_s]
    return min([PATIENCE_S, *(SHARE_OF_LIMITS * limit for limit in limits if limit)])
