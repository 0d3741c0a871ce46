"""What model_index.json says of a component: its library and class, told from its own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import PreTrainedModel

from deployments.errors import CheckpointError
from deployments.weights.files import read_object
from deployments.weights.parts.pipeline_class import classes_of, parameters_of

Entry = list[str]  # library, class

DIFFUSERS_CONFIGS = ("config.json", "scheduler_config.json", "guider_config.json")
# Files of transformers and the key of each that names a class.
TRANSFORMERS_CONFIGS = {
    "tokenizer_config.json": ("tokenizer_class",),
    "processor_config.json": ("processor_class",),
    "preprocessor_config.json": ("image_processor_type", "feature_extractor_type", "processor_class"),
}


def own_class(folder: Path) -> type | None:
    """The class that a component's files name; None where only the pipeline can tell which it is to be.

    Raises CheckpointError for a folder that is no component.
    """
    for name in DIFFUSERS_CONFIGS:
        if (folder / name).is_file() and (named := read_object(folder / name).get("_class_name")):
            found = getattr(diffusers, str(named), None)
            if not isinstance(found, type):
                raise CheckpointError(f"{folder / name} names {named!r}, which diffusers {diffusers.__version__} lacks")
            return found
    if not any((folder / name).is_file() for name in ("config.json", *TRANSFORMERS_CONFIGS)):
        raise CheckpointError(
            f"{folder} is no component: it has none of {', '.join((*DIFFUSERS_CONFIGS, *TRANSFORMERS_CONFIGS))}. "
            "Where it lies deeper, name that with `subfolder`"
        )
    return None


def entry_of(name: str, folders: Sequence[Path], before: Any, pipeline_class: Any) -> Entry:
    """`before` is the checkpoint's own entry of that name, if it has one. Raises CheckpointError."""
    annotated = classes_of(parameters_of(pipeline_class).get(name))
    kept = before if isinstance(before, list) and all(isinstance(each, str) for each in before) else None
    if len(folders) > 1:
        return entry(container_in(name, annotated, pipeline_class))
    found = own_class(folders[0])
    if found is not None:
        return kept if kept and kept[1] == found.__name__ else entry(found)
    if kept:
        return kept
    of_transformers = [cls for cls in annotated if issubclass(cls, PreTrainedModel) or not is_model(cls)]
    if len(of_transformers) == 1:
        return entry(of_transformers[0])
    return entry(named_class(name, folders[0]))


def container_in(name: str, annotated: Sequence[Any], pipeline_class: Any) -> Any:
    """The class that holds several, as the annotation of the pipeline names it."""
    for cls in annotated:
        if is_model(cls) and "Multi" in cls.__name__:
            return cls
    raise CheckpointError(f"components.{name}: {pipeline_class.__name__} takes one, not a list")


def is_model(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, torch.nn.Module)


def named_class(name: str, folder: Path) -> Any:
    said = [
        str(read_object(folder / file).get(key))
        for file, keys in TRANSFORMERS_CONFIGS.items()
        if (folder / file).is_file()
        for key in keys
    ]
    if (folder / "config.json").is_file():
        said += [str(each) for each in read_object(folder / "config.json").get("architectures") or ()]
    for each in said:
        if isinstance(found := getattr(transformers, each, None), type):
            return found
    raise CheckpointError(f"components.{name}: {folder} does not say which class of transformers it is")


def entry(cls: Any) -> Entry:
    library = cls.__module__.partition(".")[0]
    return [library if library in ("diffusers", "transformers") else cls.__module__, cls.__name__]
