"""REPLICAS: which deployments there are, a row each, and how those of an application are bound to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class PlacedModel:
    """A model, and the deployments that run its encoder, its denoiser and its VAE, by their names in REPLICAS.

    With `verify` the replicas that denoise hold the split against the unsplit pipeline before they start.
    `named_after`: see `deployment_name`.
    """

    model: ModelArgs
    names: tuple[str, str, str]
    verify: bool = False
    named_after: str | None = None

    def called_by(self, kind: ReplicaKind) -> tuple[StageName, ...]:
        return (*kind.calls, *(kind.calls_to_warm_up if self.model.warm_up else ()))


@dataclass(frozen=True)
class SharedDeployment:
    """A row of REPLICAS whose replicas do their stages for several models, which are told by their names."""

    kind: str
    models: tuple[str, ...]

    @property
    def name(self) -> str:
        return deployment_name(self.kind, BETWEEN_MODELS.join(self.models))


BETWEEN_MODELS = "+"  # in the name of a deployment; no model's name has it


def bind_stages(
    model: ModelArgs,
    names: tuple[str, str, str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    verify: bool = False,
    named_after: str | None = None,
) -> Bound:
    """The deployments of one model, see PlacedModel. `options` are further ones of Ray Serve, by names in REPLICAS."""
    return bind_models([PlacedModel(model, names, verify, named_after)], options=options)[model.name]


def bind_models(
    models: Sequence[PlacedModel],
    shared: Sequence[SharedDeployment] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Bound]:
    """The deployments of each model by its name; those of `shared` are the same for several."""
    by_name = {placed.model.name: placed for placed in models}
    together = [(each.kind, each.name, [by_name[name] for name in each.models]) for each in shared]
    of_several = {(kind, placed.model.name) for kind, _, placed_there in together for placed in placed_there}
    alone = [
        (kind, deployment_name(kind, placed.named_after), [placed])
        for placed in models
        for kind in dict.fromkeys(placed.names)
        if (kind, placed.model.name) not in of_several
    ]
    bound: dict[tuple[str, str], Application] = {}  # by the row, and the model's name

    def handles(placed: PlacedModel, kind: ReplicaKind) -> dict[StageName, Application]:
        running = dict(zip(STAGES, placed.names, strict=True))
        return {stage: bound[running[stage], placed.model.name] for stage in placed.called_by(kind)}

    for row, name, (first, *further) in sorted([*together, *alone], key=lambda each: BOUND_AFTER[each[0]]):
        kind = REPLICAS[row]
        checked = processes_of(first.names) if first.verify and "denoiser" in kind.stages else ()
        also = tuple((placed.model, handles(placed, kind)) for placed in further)
        own = {"name": name, **(options or {}).get(row, {})}
        application = deployment(kind, **own).bind(
            first.model, kind.stages, handles(first, kind), checked=checked, **({"also": also} if also else {})
        )
        bound |= {(row, placed.model.name): application for placed in (first, *further)}
    return {name: bound_as(placed, bound) for name, placed in by_name.items()}


# The called ones first.
BOUND_AFTER = {name: len((*kind.calls, *kind.calls_to_warm_up)) for name, kind in REPLICAS.items()}


def bound_as(placed: PlacedModel, bound: Mapping[tuple[str, str], Application]) -> Bound:
    encoder, denoiser, vae = (bound[kind, placed.model.name] for kind in placed.names)
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
