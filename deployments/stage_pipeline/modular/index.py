"""Reads modular_model_index.json: the class that the stages call, and the components that are loaded from files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoModel, ModularPipeline
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import SequentialPipelineBlocks

from deployments.errors import CheckpointError
from deployments.stage_pipeline.modular.pipeline import called_class
from deployments.weights.files import MODULAR_INDEX, read_object

CUSTOM_BLOCKS = "modular_config.json"
UNREADABLE = (ImportError, AttributeError, LookupError, OSError, TypeError, ValueError, RuntimeError)


def read_modular_index(folder: Path) -> tuple[type[ModularPipeline], dict[str, Any]]:
    """The class of the pipeline, called like any other, and the classes of its components by name.

    Every component that is loaded from files lies in the folder of its name. Raises CheckpointError.
    """
    file = folder / MODULAR_INDEX
    index = read_object(file)
    pipeline_class = named_pipeline(file, index)
    refuse_custom_blocks(folder, index)
    try:
        unloaded = pipeline_class(pretrained_model_name_or_path=str(folder), modular_config_dict=dict(index))
        classes = {name: component_class(index, spec) for name, spec in loaded_specs(folder, unloaded).items()}
        guiders = guiders_of(folder, unloaded, classes)
    except UNREADABLE as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    others = {name: cls for name, cls in classes.items() if not issubclass(cls, torch.nn.Module)}
    return called_class(unloaded, guiders, index, others), classes


def named_pipeline(file: Path, index: dict[str, Any]) -> type[ModularPipeline]:
    """Raises CheckpointError where diffusers has no such pipeline."""
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, ModularPipeline)) or found is ModularPipeline:
        raise CheckpointError(
            f"{file} names the modular pipeline {name!r}, which diffusers {diffusers.__version__} lacks"
        )
    return found


def refuse_custom_blocks(folder: Path, index: dict[str, Any]) -> None:
    """Raises CheckpointError for blocks that are code of the checkpoint: no such code is run."""
    name = index.get("_blocks_class_name")
    is_known = name is None or hasattr(diffusers, str(name)) or name == SequentialPipelineBlocks.__name__
    if not is_known or (folder / CUSTOM_BLOCKS).exists():
        raise CheckpointError(
            f"{folder} brings blocks of its own ({name}), which are code (trust_remote_code): code of a checkpoint is "
            "not run, only the blocks that diffusers has are served"
        )


def loaded_specs(folder: Path, unloaded: ModularPipeline) -> dict[str, Any]:
    """Of the components that have files; the others of the blocks are optional and left out, as diffusers does."""
    return {
        name: spec
        for name, spec in unloaded._component_specs.items()
        if spec.default_creation_method == "from_pretrained"
        and (spec.pretrained_model_name_or_path is not None or (folder / name).is_dir())
    }


def component_class(index: dict[str, Any], spec: Any) -> Any:
    """The class that a component is loaded by: where the specification only says AutoModel, the one it was saved as."""
    found = spec.type_hint
    if found is None or found is AutoModel:
        library, name, _ = index.get(spec.name) or (None, None, None)
        found = getattr(importlib.import_module(library), name) if library and name else None
    if not callable(getattr(found, "from_pretrained", None)):
        raise ValueError(f"it names no class for {spec.name} that loads it")
    return found


def guiders_of(folder: Path, unloaded: ModularPipeline, classes: dict[str, Any]) -> dict[str, BaseGuidance]:
    made = {name: each for name, each in unloaded.components.items() if isinstance(each, BaseGuidance)}
    stored = {name: cls for name, cls in classes.items() if issubclass(cls, BaseGuidance)}
    return made | {name: cls.from_pretrained(str(folder / name)) for name, cls in stored.items()}
