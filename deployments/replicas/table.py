"""REPLICAS: which deployments there are, a row each, and how those of an application are bound to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.messages import STAGES, StageName
from deployments.model import ModelArgs
from deployments.replicas.adapter_routing import holders_first

Bound = tuple[Application, Application, Application]  # the encoder, the denoiser, the VAE


@dataclass(frozen=True)
class ReplicaKind:
    """A deployment: its replicas run `stages` and call the replicas that run the stages in `calls`."""

    name: str
    stages: tuple[StageName, ...]
    options: Mapping[str, Any]  # of Ray Serve
    calls: tuple[StageName, ...] = ()
    calls_to_warm_up: tuple[StageName, ...] = ()  # once, at its start


# By its path, which Serve imports in the replica: what builds an application then loads no torch.
STAGE_REPLICA = "deployments.stage_replica.StageReplica"

ONE_AT_A_TIME = {"max_ongoing_requests": 32, "health_check_period_s": 2}  # the others wait in the replica
# Draining a denoiser is a bounded wait: what is not done by then goes on elsewhere from its last checkpoint.
DENOISING = {
    "max_ongoing_requests": 16,
    "health_check_period_s": 2,
    "graceful_shutdown_timeout_s": 10,
    "request_router_config": holders_first(),
}

REPLICAS = {
    kind.name: kind
    for kind in (
        ReplicaKind("Encoder", ("encoder",), ONE_AT_A_TIME),
        ReplicaKind("Denoiser", ("denoiser",), DENOISING, calls=("encoder", "vae")),
        ReplicaKind("VAE", ("vae",), ONE_AT_A_TIME, calls_to_warm_up=("encoder",)),
        ReplicaKind("EncoderVAE", ("encoder", "vae"), ONE_AT_A_TIME),
        ReplicaKind("Pipeline", STAGES, DENOISING),
    )
}


def bind_stages(
    model: ModelArgs,
    names: tuple[str, str, str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    verify: bool = False,
    named_after: str | None = None,
) -> Bound:
    """The deployments that run the encoder, the denoiser and the VAE, by their names in REPLICAS.

    `options` are further options of Ray Serve, by the names there. With `verify` the replicas that denoise hold the
    split against the unsplit pipeline before they start. `named_after`: see `deployment_name`.
    """
    more = options or {}
    running = dict(zip(STAGES, names, strict=True))
    bound: dict[str, Application] = {}
    for name in sorted(dict.fromkeys(names), key=lambda name: len(REPLICAS[name].calls)):  # the called ones first
        kind = REPLICAS[name]
        called = (*kind.calls, *(kind.calls_to_warm_up if model.warm_up else ()))
        handles = {stage: bound[running[stage]] for stage in called}
        checked = processes_of(names) if verify and "denoiser" in kind.stages else ()
        own = {"name": deployment_name(name, named_after), **more.get(name, {})}
        bound[name] = deployment(kind, **own).bind(model, kind.stages, handles, checked=checked)
    encoder, denoiser, vae = (bound[name] for name in names)
    return encoder, denoiser, vae


def deployment_name(kind: str, named_after: str | None) -> str:
    """Of a row of REPLICAS in an application: its own, or with that of the model where there are several."""
    return kind if named_after is None else f"{kind}-{named_after}"


def processes_of(names: tuple[str, str, str]) -> tuple[tuple[StageName, ...], ...]:
    """The stages of each process, where these deployments run the encoder, the denoiser and the VAE."""
    return tuple(dict.fromkeys(REPLICAS[name].stages for name in names))


def deployment(kind: ReplicaKind, **options: Any) -> Any:
    """The Ray Serve deployment of the row; `options` come on top of the row's own."""
    return serve.deployment(**{"name": kind.name, **kind.options, **options})(STAGE_REPLICA)
