"""Whether what a Serve config asks for fits on the cards that it is for, where its checkpoint's configuration is here.

The card is named by whoever checks, or by `accelerator_type` among the `ray_actor_options` of a deployment.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from deployments.messages import STAGES
from deployments.plan.budget import Choice, Demand, Levers, Processes, demands, needed, usable, weight
from deployments.plan.cards import Card, UnknownCardError, card_of
from deployments.plan.choose import ORDINALS, gb
from deployments.plan.measured import Measured, Scheme
from deployments.plan.process import MeasureOrder, run_measure
from deployments.replicas.table import REPLICAS, SharedDeployment
from env_config.children import environment_of_children
from env_config.serve_config import mapping, read_serve_configs
from serve_app.app import AppArgs, ModelEntry, model_args, shared_deployments
from serve_app.app import deployments_of as deployments_of_model
from serve_app.models.shared import held_before

BUILDER = "serve_app.app:build_app"
PARTS = {
    "ulysses": "the sequence's activations, and all weights",
    "ring": "the sequence's activations, and all weights",
    "tensor": "the weights above, and the activations of the whole sequence",
    "batch": "the requests of a merged forward, and all weights",
}


def cannot_fit(file: Path | str, named: Card | None) -> list[str]:
    """A sentence for each application of the file that needs more than its cards have, at its default size.

    Of a valid file; `named` is the card, where whoever checks knows it. Nothing is said of a checkpoint that is not in
    a folder here, nor without a card.
    """
    applications = [each for config in read_serve_configs(Path(file)) for each in config["applications"]]
    return [f"{file}: warning: {sentence}" for each in applications for sentence in of_application(each, named)]


def of_application(application: Mapping[str, Any], named: Card | None) -> Iterator[str]:
    card = named or card_in(application)
    if card is None or application.get("import_path") != BUILDER:
        return
    args = AppArgs.model_validate(application.get("args") or {})
    where = f"applications[{application.get('name', 'default')}]"
    models = {name: model_args(args, name) for name in args.entries}
    shared = shared_deployments(args)
    demanded_by_all: list[Demand] = []
    told: list[str] = []
    sizes: list[str] = []
    for name, entry in args.entries.items():
        model = models[name]
        if not Path(model.path).is_dir():
            continue
        measured = run_measure(MeasureOrder(model=model), environment_of_children())
        if measured.problem:
            yield f"{where}: it cannot be told whether {name} fits: {measured.problem}"
            continue
        held_twice = {each.name: held_before(models, name, each) for each in shared if name in each.models}
        demanded_by_all += demanded(measured, args, application, 1, name, shared, held_twice)
        sizes.append(f"{measured.width}x{measured.height}")
        told.append(f"{name} in {entry.placement}")
    totals = needed(each_process_once(demanded_by_all))
    if totals and (most := max(totals.values())) > usable(card.num_bytes):
        addresses = [entry.model for entry in args.entries.values()]
        yield (
            f"{where}: {' and '.join(told)} {'needs' if len(told) == 1 else 'need'} {gb(most)} on one card, at "
            f"{' and '.join(sizes)} and one request at a time; {card.name} has {gb(card.num_bytes)}, of which "
            f"{gb(usable(card.num_bytes))} can be counted on. `python -m serve_app.tools.plan "
            f"{addresses[0] if len(addresses) == 1 else 'MODEL'} --gpu {card.name}` tells what fits"
        )


def needs(measured: Measured, args: AppArgs, application: Mapping[str, Any], card: Card) -> Iterator[str]:
    """What the config as it is needs, in lines: weights, activations, and the sum on each card."""
    levers = levers_of(args, measured)
    parallel = args.parallel.degrees if args.parallel else {}
    tensor = parallel.get("tensor", 1)
    held = {each.name: weight(each, each.stages, levers, tensor) for each in measured.components}
    weights = ", ".join(f"{name} {num_bytes / 1e9:.1f}" for name, num_bytes in held.items())
    yield f"Weights in GB: {weights}."
    for way, degree in parallel.items():
        yield f"{degree} ranks by {way}: each has its part of {PARTS[way]}."
    frames = f", {measured.num_frames} frames" if measured.num_frames > 1 else ""
    peaks = ", ".join(f"{stage} {measured.peak(stage) / 1e9:.1f}" for stage in STAGES)
    yield f"Activations of one request of {measured.width}x{measured.height}{frames} in GB: {peaks}."
    merged = args.denoising.max_batch_size
    lone, most = (demanded(measured, args, application, size) for size in (1, merged))
    for number, total in sorted(needed(lone).items()):
        parts = ", ".join(f"{each.name} {each.total / 1e9:.1f}" for each in lone if each.card == number)
        more = (
            f", {needed(most)[number] / 1e9:.1f} with {merged} requests merged" if needed(most)[number] != total else ""
        )
        which = f" on a {ORDINALS[min(number, len(ORDINALS) - 1)]} card" if number else ""
        yield f"{card.name}: {total / 1e9:.1f} of {card.num_bytes / 1e9:.1f} GB{which} ({parts}){more}."


def levers_of(args: AppArgs | ModelEntry, measured: Measured) -> Levers:
    """A word for all denoisers, or one for each component that is named; a GGUF file's name tells of how many bits."""
    asked = args.precision or {}
    if isinstance(asked, str):
        asked = {each.name: asked for each in measured.components if each.is_denoiser}
    precision: dict[str, Scheme] = {name: scheme_of(word) for name, word in asked.items()}
    return Levers(precision, frozenset(name for name, how in args.offload.items() if how.kind == "group"))


def scheme_of(word: str) -> Scheme:
    if word.endswith(".gguf"):
        return "gguf_q8" if "q8" in word.lower() else "gguf_q4"
    return cast(Scheme, word)  # the args allow no other


def demanded(
    measured: Measured,
    args: AppArgs,
    application: Mapping[str, Any],
    merged: int,
    name: str | None = None,
    shared: Sequence[SharedDeployment] | None = None,
    held_twice: Mapping[str, Collection[str]] | None = None,
) -> tuple[Demand, ...]:
    """By the processes of the model of this name, or of the only one, on the cards that all models share.

    `shared`: see `deployments_of`. `held_twice`: by process, components that it has for another model already.
    """
    name, entry = args.entry(name)
    shared = shared_deployments(args) if shared is None else shared
    parallel = entry.parallel.degrees if entry.parallel else {}
    choice = Choice(entry.placement, levers_of(entry, measured), entry.vae.tiling == "on", merged, parallel=parallel)
    names = [each for model in args.entries for each in deployments_of_model(args, model, shared)]
    found = demands(measured, choice, processes_of(args, name, shared), cards_of(names, application))

    def there_already(demand: Demand) -> int:
        twice = (held_twice or {}).get(demand.process, ())
        return sum(weight(each, demand.stages, choice.levers) for each in measured.components if each.name in twice)

    return tuple(replace(demand, weights=demand.weights - there_already(demand)) for demand in found)


def each_process_once(demanded: Sequence[Demand]) -> list[Demand]:
    """Of several models in one process: the weights of all, the activations of the hungriest, which work by turns."""
    found: dict[str, Demand] = {}
    for each in demanded:
        before = found.get(each.name)
        found[each.name] = (
            each
            if before is None
            else replace(
                each, weights=before.weights + each.weights, activations=max(before.activations, each.activations)
            )
        )
    return list(found.values())


def processes_of(args: AppArgs, name: str, shared: Sequence[SharedDeployment]) -> Processes:
    kinds = deployments_of_model(args, name, shared)
    return tuple((deployment, REPLICAS[kind].stages) for deployment, kind in kinds.items())


def cards_of(names: Sequence[str], application: Mapping[str, Any]) -> dict[str, int]:
    """On which card Ray puts each process: the largest shares first, each where it still fits."""
    shares = {process: share for name in names for process, share in shares_of(name, application).items()}
    free: list[float] = []
    found: dict[str, int] = {}
    for name in sorted(shares, key=lambda name: -shares[name]):
        card = next((n for n, left in enumerate(free) if left + 1e-6 >= shares[name]), len(free))
        if card == len(free):
            free.append(1.0)
        free[card] -= shares[name]
        found[name] = card
    return found


def shares_of(name: str, application: Mapping[str, Any]) -> dict[str, float]:
    """Of a deployment, and of its other ranks, by the names that demands have."""
    own = next((each for each in deployments_of(application) if each.get("name") == name), {})
    share = float(mapping(own, "ray_actor_options").get("num_gpus") or 0)
    others = list(own.get("placement_group_bundles") or [])[1:]
    ranks = {Demand(name, (), 0, 0, 0, rank).name: bundle for rank, bundle in enumerate(others, 1)}
    return {name: share, **{rank: float(bundle.get("GPU") or 0) for rank, bundle in ranks.items()}}


def card_in(application: Mapping[str, Any]) -> Card | None:
    """That of `accelerator_type`; None where there is none, or one that is not in the table."""
    for each in deployments_of(application):
        if (name := mapping(each, "ray_actor_options").get("accelerator_type")) is not None:
            try:
                return card_of(str(name))
            except UnknownCardError:
                return None
    return None


def deployments_of(application: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [each for each in application.get("deployments") or [] if isinstance(each, Mapping)]
