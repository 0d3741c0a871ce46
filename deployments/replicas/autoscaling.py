"""What a replica reports to `serve_app.autoscaling`: the load of each of its stages and its start, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

from deployments.engine.engine import Engine
from deployments.messages import StageName
from deployments.observability.stage_load import Load


def autoscaling_stats(loads: Mapping[StageName, Load], engine: Engine | None, load_s: float) -> dict[str, float]:
    """The fields of each Load under the name of its stage, such as `vae_busy_s`; `engine` is the denoiser's.

    `load_s`: how long the replica's own start took, from its first line to the end of its warm-up.
    """
    told = dict(loads)
    if engine is not None:
        outstanding_s = denoising_outstanding_s(loads["denoiser"], engine)
        told["denoiser"] = replace(loads["denoiser"], outstanding_s=outstanding_s)
    stages = {f"{stage}_{name}": value for stage, load in told.items() for name, value in asdict(load).items()}
    return stages | {"load_s": load_s}


def denoising_outstanding_s(load: Load, engine: Engine) -> float:
    """Predicted busy seconds of the requests in the engine: by their own forwards, or like others before the first."""
    forwards_s, device_s = engine.remaining_s(), engine.statistics.seconds
    busy_share = load.busy_s / device_s if load.request_s and device_s else 1.0  # schedulers, hand-overs
    return sum(forwards_s) * busy_share + max(0, load.present - len(forwards_s)) * load.request_s
