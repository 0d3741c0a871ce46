"""Which pipeline takes a checkpoint's components together with those that were added to them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from deployments.errors import CheckpointError

MOST_NAMED = 8  # pipelines in a refusal


def pipeline_for(own: str, added: Mapping[str, type | None], kept: Collection[str], asked: str | None) -> Any:
    """The class `asked`, or `own` if it takes what was added, or the one that diffusers has for the same task with it.

    `added` are components with their classes (None: not known), `kept` those of the checkpoint. Raises CheckpointError.
    """
    if asked is not None:
        found = exported(asked)
        if found is None:
            raise CheckpointError(f"pipeline_class: diffusers {diffusers.__version__} has no pipeline {asked!r}")
    else:
        found = exported(own)
        if found is None:
            raise CheckpointError(f"model_index.json names the pipeline {own!r}, which diffusers lacks")
        unknown = sorted(added.keys() - parameters_of(found).keys())
        if unknown or not takes(found, added):
            found = next((each for each in relatives(found, added) if each and takes(each, added)), found)
        if unknown and not takes(found, added):
            raise CheckpointError(f"components: {own} takes no {' and no '.join(unknown)}: {remedy(unknown)}")
    check_taken(found, added, kept)
    return found


def parameters_of(pipeline_class: Any) -> dict[str, inspect.Parameter]:
    """What its constructor takes, by name."""
    parameters = dict(inspect.signature(pipeline_class.__init__).parameters)
    parameters.pop("self")
    return parameters


def classes_of(parameter: inspect.Parameter | None) -> list[Any]:
    """The classes that a component's annotation names, those of lists included."""
    return list(dict.fromkeys(classes_in(parameter.annotation))) if parameter is not None else []


def classes_in(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple):
        for part in typing.get_args(annotation):
            yield from classes_in(part)
    elif isinstance(annotation, type) and annotation not in (type(None), inspect.Parameter.empty, object):
        yield annotation


def exported(name: str) -> Any:
    """None where diffusers has no such pipeline, or not with the libraries that are installed."""
    try:
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError):
        return None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def takes(pipeline_class: Any, added: Mapping[str, type | None]) -> bool:
    parameters = parameters_of(pipeline_class)
    return all(
        name in parameters and (cls is None or fits(cls, classes_of(parameters[name]))) for name, cls in added.items()
    )


def fits(cls: type, annotated: list[Any]) -> bool:
    """Schedulers are many for one pipeline, whatever it names; a model must be one of those that it names."""
    return not annotated or not issubclass(cls, torch.nn.Module) or any(issubclass(cls, each) for each in annotated)


def relatives(own: Any, added: Collection[str]) -> Iterator[Any]:
    """Pipelines that are named as `own` with an added component; then those of its task in diffusers' own table."""
    for name in added:
        wanted = own.__name__.removesuffix("Pipeline") + name.replace("_", "") + "Pipeline"
        yield from (exported(each) for each in dir(diffusers) if each.lower() == wanted.lower())
    from diffusers.pipelines.auto_pipeline import SUPPORTED_TASKS_MAPPINGS  # imports most pipelines of diffusers

    for name in added:
        for task in SUPPORTED_TASKS_MAPPINGS:
            prefixes = tuple(f"{key}-{name}" for key, cls in task.items() if cls is own)
            yield from (cls for key, cls in task.items() if key.startswith(prefixes))


def remedy(added: Collection[str]) -> str:
    words = [name.replace("_", "") for name in added]
    able = [each for each in dir(diffusers) if each.endswith("Pipeline") and all(w in each.lower() for w in words)]
    names = ", ".join(able[:MOST_NAMED])
    return f"name a pipeline that does with `pipeline_class:`{f', such as {names}' if able else ''}"


def check_taken(pipeline_class: Any, added: Mapping[str, type | None], kept: Collection[str]) -> None:
    parameters = parameters_of(pipeline_class)
    for name, cls in added.items():
        if name not in parameters:
            raise CheckpointError(
                f"components.{name}: {pipeline_class.__name__} takes none; it takes {', '.join(parameters)}"
            )
        if cls is not None and not fits(cls, annotated := classes_of(parameters[name])):
            raise CheckpointError(
                f"components.{name}: it is a {cls.__name__}, and {pipeline_class.__name__} takes "
                f"{' or '.join(each.__name__ for each in annotated)}"
            )
    if missing := lacking(pipeline_class, {*added, *kept}):
        raise CheckpointError(
            f"{pipeline_class.__name__} needs {', '.join(missing)}, which the checkpoint does not have: name it in "
            "`components:`"
        )


def lacking(pipeline_class: Any, there: Collection[str]) -> list[str]:
    optional = set(getattr(pipeline_class, "_optional_components", ()))
    return [
        name
        for name, parameter in parameters_of(pipeline_class).items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in optional
        and name not in there
    ]
