"""`share`: deployments whose replicas do their stage for several models, with what is equal of their weights once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from pydantic import BeforeValidator

from deployments.errors import CheckpointError
from deployments.messages import StageName
from deployments.model import ModelArgs, off_of_yaml
from deployments.replicas.table import BETWEEN_MODELS, REPLICAS, SharedDeployment
from deployments.weights.files import INDEX, read_object
from deployments.weights.shared.same_files import Stored, difference, names_in
from env_config.closest import did_you_mean

logger = logging.getLogger(__name__)

Share = Annotated[Literal["off", "auto"] | tuple[str, ...], BeforeValidator(off_of_yaml)]
Placements = Mapping[str, tuple[str, str, str]]  # the deployments of each word of `placement`
StoredClass = tuple[str, Stored]  # the name of a component's class, and its files

# A denoiser's engine owns its device.
SHAREABLE = tuple(name for name, kind in REPLICAS.items() if "denoiser" not in kind.stages)
# What must be alike for several models in one process.
SHARED_SETTINGS = ("watchdog", "fence_device_memory", "denoising.deterministic")
# What `auto` takes to keep all components of two models apart; a replica looks at each.
KEPT_APART_BY = (*SHARED_SETTINGS, "dtype", "component_dtypes", "variant", "vae", "offload")


def shared_named(name: str) -> SharedDeployment:
    """KIND-MODEL+MODEL ... Raises ValueError."""
    kind, _, models = name.partition("-")
    if kind not in SHAREABLE:
        raise ValueError(f"share: {name!r} must begin with one of {', '.join(f'{each}-' for each in SHAREABLE)}")
    return SharedDeployment(kind, tuple(models.split(BETWEEN_MODELS)))


def check_shared(names: tuple[str, ...], models: Mapping[str, Any], placements: Placements) -> None:
    """Raises ValueError. `models`: ModelEntries by name."""
    seen: dict[tuple[str, str], str] = {}
    for name in names:
        shared = shared_named(name)
        if len(shared.models) < 2:
            raise ValueError(f"share: {name!r} must name two models or more, such as {shared.kind}-flux+chroma")
        for model in shared.models:
            if model not in models:
                hint = did_you_mean(model, models, f"there are {', '.join(models)}")
                raise ValueError(f"share: {name!r}: {model!r} is no model here; {hint}")
            if shared.kind not in placements[models[model].placement]:
                raise ValueError(
                    f"share: {name!r}: {model} has no {shared.kind}, it is served with placement: "
                    f"{models[model].placement}"
                )
            if has_ranks(shared.kind, models[model]):
                raise ValueError(
                    f"share: {name!r}: {model} has vae.parallel, whose ranks hold one model: leave one of them out"
                )
            if before := seen.get((shared.kind, model)):
                raise ValueError(f"share: {model} is in {before!r} and in {name!r}: it can be in one of them, once")
            seen[shared.kind, model] = name
        first, *others = shared.models
        for setting in SHARED_SETTINGS:
            for other in others:
                if value_of(models[first], setting) != value_of(models[other], setting):
                    raise ValueError(f"share: {name!r}: {setting} must be the same for {first} and {other}")


def has_ranks(kind: str, model: Any) -> bool:
    """Whether ranks decode in the model's deployments of this kind."""
    return model.vae.parallel is not None and "vae" in REPLICAS[kind].stages


def value_of(settings: Any, path: str) -> Any:
    for name in path.split("."):
        settings = getattr(settings, name)
    return settings


def found_to_share(
    models: Mapping[str, ModelArgs], placements: Mapping[str, tuple[str, ...]]
) -> tuple[SharedDeployment, ...]:
    """Those of models that have a component in common, proved by their files; told in the log. `placements`: the
    deployments of each model.

    Raises ValueError for a model whose files are not here, CheckpointError for files that cannot be read.
    """
    found = []
    for kind in SHAREABLE:
        here = {name: each for name, each in models.items() if kind in placements[name] and not has_ranks(kind, each)}
        stored = {name: components_of(model, kind) for name, model in here.items()}
        group_of = {name: name for name in stored}  # the first model of its group
        for one, other in combinations(stored, 2):
            common = [] if are_apart(models[one], models[other]) else in_common(stored[one], stored[other])
            if common:
                logger.info("share: auto: in the %s of %s and %s: %s", kind, one, other, ", ".join(common))
                group_of |= {name: group_of[one] for name, first in group_of.items() if first == group_of[other]}
        groups = [[name for name in stored if group_of[name] == first] for first in dict.fromkeys(group_of.values())]
        found += [SharedDeployment(kind, tuple(group)) for group in groups if len(group) > 1]
    logger.info("share: auto: %s", ", ".join(each.name for each in found) or "no model has anything in common")
    return tuple(found)


def are_apart(one: ModelArgs, other: ModelArgs) -> bool:
    """Whether their arguments are taken to keep all their components apart."""
    precisions = [each.precision if isinstance(each.precision, dict) else None for each in (one, other)]  # of encoders
    return precisions[0] != precisions[1] or any(value_of(one, name) != value_of(other, name) for name in KEPT_APART_BY)


def in_common(mine: Mapping[str, StoredClass], theirs: Mapping[str, StoredClass]) -> list[str]:
    """The names of my components that are equal to one of theirs."""
    return [
        name
        for name, (cls, stored) in mine.items()
        if any(cls == other and difference(stored, place) is None for other, place in theirs.values())
    ]


def held_before(models: Mapping[str, ModelArgs], name: str, shared: SharedDeployment) -> set[str]:
    """The components of a model that its shared deployment holds for a model named before it; none where that is not
    known here."""
    found: set[str] = set()
    with suppress(ValueError, CheckpointError):
        mine = components_of(models[name], shared.kind)
        for other in shared.models[: shared.models.index(name)]:
            if not are_apart(models[name], models[other]):
                found |= set(in_common(mine, components_of(models[other], shared.kind)))
    return found


def useless(models: Mapping[str, ModelArgs], shared: Sequence[SharedDeployment]) -> Iterator[str]:
    """A sentence for each model that has no component at all in common with those it shares a deployment with, where
    the files of all are here."""
    for each in shared:
        with suppress(ValueError, CheckpointError):
            stored = {name: components_of(models[name], None) for name in each.models}
            for name in each.models:
                if not any(in_common(stored[name], stored[other]) for other in each.models if other != name):
                    others = " and ".join(other for other in each.models if other != name)
                    yield f"share: {each.name!r}: {name} has nothing in common with {others}: leave it out"


def components_of(model: ModelArgs, kind: str | None) -> dict[str, StoredClass]:
    """Those with weights that the replicas of the row need, or all of the model. Raises ValueError for those that are
    not here, CheckpointError for files that cannot be read."""
    folder = folder_of(model)
    return {
        name: (entry[1], stored)
        for name, entry in read_object(folder / INDEX).items()
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry)
        if kind is None or stage_of(*entry) in REPLICAS[kind].stages
        if (stored := stored_component(model, folder, name)) is not None
    }


def stage_of(library: str, cls: str) -> StageName | None:
    """By its class's name, since this process has no torch; None: it is not looked at."""
    if library == "transformers":
        return "encoder"
    return "vae" if library == "diffusers" and cls.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQ")) else None


def stored_component(model: ModelArgs, folder: Path, name: str) -> Stored | None:
    """None for a tokenizer, and for what `components` leaves out. Raises ValueError."""
    own = folder / name
    if name in model.components.parts:
        parts = model.components.parts[name]
        if parts is None:
            return None
        own = Path(parts[0].path).expanduser() / parts[0].subfolder
        if not own.is_dir():
            raise ValueError(not_told(model, f"{own} is not here"))
    if own.is_dir() and not (own / "config.json").is_file():
        return None
    names = names_in(own, model.variant)
    if names is None:
        raise ValueError(not_told(model, f"{name} has no safetensors here"))
    return Stored(own, names, model.variant)


def folder_of(model: ModelArgs) -> Path:
    """Raises ValueError for a checkpoint that is not here."""
    here = Path(model.path).expanduser()
    if (here / INDEX).is_file():
        return here
    try:
        cached = try_to_load_from_cache(model.path, INDEX)
    except HFValidationError:  # s3://bucket/prefix, a path
        cached = None
    if not isinstance(cached, str):
        raise ValueError(
            not_told(model, f"there is no folder {model.path!r} with a {INDEX}, and the hub's cache has none")
        )
    return Path(cached).parent


def not_told(model: ModelArgs, why: str) -> str:
    return (
        f"share: auto cannot tell what {model.name} has in common: {why}; name the deployments, such as [Encoder-a+b]"
    )
