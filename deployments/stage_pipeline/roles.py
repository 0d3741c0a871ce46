"""Which stage needs the weights of which component, told from what each component does."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin

from deployments.errors import CheckpointError
from deployments.messages import StageName
from deployments.stage_pipeline.modular.index import read_modular_index
from deployments.tensors.arguments import TIME_PARAMETERS
from deployments.weights.files import INDEX, MODULAR_INDEX, read_object
from deployments.weights.parts.ip_adapter import IPAdapters, read_ip_adapters

# Models that take no time step of their own and still belong to the loop.
DENOISER_NAMES = frozenset({"transformer", "unet", "controlnet"})
ENCODED = frozenset({"input_ids", "pixel_values", "input_features", "input_values"})  # what encoders take first


@dataclass(frozen=True)
class PipelineLayout:
    """The pipeline of a checkpoint folder: its class, its models and the stages that need each of them."""

    folder: Path
    pipeline_class: type[Any]
    classes: dict[str, Any]  # of every component, tokenizers and schedulers too
    models: dict[str, type[torch.nn.Module]]  # of those with weights
    stages_of: dict[str, frozenset[StageName]]
    ip_adapters: IPAdapters | None = None

    @property
    def denoisers(self) -> tuple[str, ...]:
        return tuple(name for name, stages in self.stages_of.items() if "denoiser" in stages)

    @property
    def autoencoders(self) -> tuple[str, ...]:
        return tuple(name for name, cls in self.models.items() if is_autoencoder(cls))

    @property
    def decoders(self) -> tuple[str, ...]:
        """Components that are called on the way from latents to pixels (or to sound)."""
        return tuple(
            name
            for name, stages in self.stages_of.items()
            if is_autoencoder(self.models[name]) or stages == frozenset({"vae"})
        )


def read_layout(folder: Path) -> PipelineLayout:
    """Raises CheckpointError for a folder that is no checkpoint of a pipeline that can be served."""
    pipeline_class, classes = read_index(folder)
    models = {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, torch.nn.Module)}
    if not denoising_models(models):
        check_whole_without_denoiser(folder, pipeline_class, models)
    stages_of = assign_stages(getattr(pipeline_class, "model_cpu_offload_seq", None), models)
    return PipelineLayout(folder, pipeline_class, classes, models, stages_of, read_ip_adapters(folder))


def check_whole_without_denoiser(folder: Path, pipeline_class: type[Any], models: Mapping[str, type]) -> None:
    """Raises CheckpointError unless it is a pipeline of other models, such as one that enlarges latents."""
    is_classic = (folder / INDEX).is_file()
    lacking = components_lacking(read_object(folder / INDEX), pipeline_class) if is_classic else ["a denoiser"]
    if lacking or not models:
        raise CheckpointError(
            f"{pipeline_class.__name__} in {folder} has no denoising model among {sorted(models)}: "
            f"{INDEX if is_classic else MODULAR_INDEX} lacks {', '.join(lacking) or 'models'}"
        )


def read_index(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The pipeline's class and those of its components by name. Raises CheckpointError."""
    index_file = folder / INDEX
    if not index_file.is_file():
        if (folder / MODULAR_INDEX).is_file():
            return read_modular_index(folder)
        raise CheckpointError(f"{folder} has no {INDEX}: it is not a diffusers checkpoint folder")
    index = read_object(index_file)
    name = index.get("_class_name")
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(pipeline_class, type) and issubclass(pipeline_class, DiffusionPipeline)):
        raise CheckpointError(
            f"{index_file} names the pipeline {name!r}, which diffusers {diffusers.__version__} lacks"
        )
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    classes = {
        component: component_class(entry[0], entry[1], index_file)
        for component, entry in entries.items()
        if not is_setting(component, entry, pipeline_class)
    }
    return pipeline_class, classes


def components_lacking(index: Mapping[str, Any], pipeline_class: type[DiffusionPipeline]) -> list[str]:
    """What the pipeline cannot be made without and its index does not name."""
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    return [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in index
    ]


def is_setting(name: str, entry: list[Any], pipeline_class: type[DiffusionPipeline]) -> bool:
    """Whether a list of model_index.json is an argument of the pipeline, and no component's library and class.

    Raises CheckpointError for what is neither.
    """
    if len(entry) == 2 and all(isinstance(part, str) and part for part in entry):
        return False
    parameter = inspect.signature(pipeline_class.__init__).parameters.get(name)
    if name.startswith("_") or (parameter is not None and parameter.default is not inspect.Parameter.empty):
        return True
    raise CheckpointError(f"model_index.json says {entry!r} of {name!r}: it must be a library and a class")


def component_class(library: str, name: str, index_file: Path = Path("model_index.json")) -> Any:
    """The class that model_index.json names; raises CheckpointError where it is not installed."""
    try:
        if hasattr(diffusers.pipelines, library):
            return getattr(getattr(diffusers.pipelines, library), name)
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{index_file} needs {library}.{name}, which cannot be imported: {error}") from error


def is_denoiser(component: str, cls: Any) -> bool:
    """A diffusers model whose forward takes a time step and which decodes nothing."""
    if not issubclass(cls, ModelMixin) or hasattr(cls, "decode"):
        return False
    parameters = inspect.signature(cls.forward).parameters
    return bool(TIME_PARAMETERS & set(parameters)) or component.split("_")[0] in DENOISER_NAMES


def denoising_models(models: Mapping[str, type]) -> list[str]:
    """The denoisers; where nothing denoises, what else works on latents, such as an upsampler of them.

    Empty where there are only encoders and decoders: the denoiser stage then passes on.
    """
    found = [name for name, cls in models.items() if is_denoiser(name, cls)]
    return found or [name for name, cls in models.items() if issubclass(cls, ModelMixin) and not is_autoencoder(cls)]


def is_autoencoder(cls: type) -> bool:
    return callable(getattr(cls, "decode", None))


def is_encoder(cls: Any) -> bool:
    """A model of words, pictures or sound of transformers, which reads what was given before anything is denoised.

    Vocoders and checkers of what was made read something else.
    """
    is_of_transformers = cls.__module__.startswith("transformers.models.")
    return is_of_transformers and getattr(cls, "main_input_name", None) in ENCODED


def assign_stages(offload_sequence: str | None, models: Mapping[str, type]) -> dict[str, frozenset[StageName]]:
    """The stages that need the real weights of each model.

    Its class tells of denoisers, autoencoders and encoders. For the others the offload sequence of the pipeline is
    a hint to the order of their calls; it may be absent, misspelt or incomplete. A model that it forgets (a safety
    checker, a vocoder) is kept at both ends.
    """
    sequence = [name for name in _split_sequence(offload_sequence) if name in models]
    denoisers = denoising_models(models)
    last = max((sequence.index(name) for name in denoisers if name in sequence), default=-1)
    both_ends: frozenset[StageName] = frozenset({"encoder", "vae"})
    stages: dict[str, frozenset[StageName]] = {}
    for name, cls in models.items():
        if name in denoisers:
            stages[name] = frozenset({"denoiser"})
        elif is_encoder(cls):
            stages[name] = frozenset({"encoder"})
        elif is_autoencoder(cls) or name not in sequence:
            stages[name] = both_ends
        else:
            stages[name] = frozenset({"vae"}) if sequence.index(name) > last else frozenset({"encoder"})
    return stages


def _split_sequence(sequence: str | None) -> list[str]:
    # Some pipelines write "a-unet" or "a->>b"; a hyphen never belongs to a component's name.
    return [name for name in (sequence or "").replace(">", "-").split("-") if name]
