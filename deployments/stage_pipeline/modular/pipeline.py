"""A modular pipeline as the stages load and call it: one call that takes named arguments and returns an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import InpaintProcessor
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.utils import BaseOutput

from deployments.errors import CheckpointError
from deployments.stage_pipeline.modular.blocks import Change, changes_by, leaves, order_of_use
from deployments.stage_pipeline.modular.output_classes import FIELDS, OUTPUTS
from deployments.stage_pipeline.modular.signature import (
    call_arguments,
    docstring_of,
    guider_settings,
    inputs_of_workflows,
    signature_of,
)


def called_class(
    unloaded: ModularPipeline, guiders: Mapping[str, BaseGuidance], index: Mapping[str, Any], others: Mapping[str, Any]
) -> type[ModularPipeline]:
    """A subclass of the pipeline's class, under its name, with the call, the loading and the hints of other pipelines.

    `guiders` are those of the pipeline by name, `index` is its modular_model_index.json, `others` are the classes of
    the components without weights. Raises CheckpointError for blocks that make nothing known.
    """
    base: Any = type(unloaded)
    blocks = unloaded.blocks
    arguments = call_arguments(blocks, guiders)
    inputs = {param.name for param in blocks.inputs}
    settings = {name: of for name, of in guider_settings(guiders).items() if name not in inputs}
    made = {param.name: FIELDS[param.name] for param in blocks.outputs if param.name in FIELDS}
    output_class = output_of(base.__name__, blocks, set(made.values()))

    def call(self: Any, **given: Any) -> BaseOutput:
        set_guiders(self, {settings[name]: value for name, value in given.items() if name in settings})
        passed = {name: value for name, value in given.items() if name in inputs}
        if lays_over_picture(self, passed):
            passed["output_type"] = "pil"
        state = base.__call__(self, output=list(made), **passed)
        return output_class(**{field: state[name] for name, field in made.items()})

    def from_pretrained(cls: Any, /, folder: str, local_files_only: bool = True, **models: torch.nn.Module) -> Any:
        pipeline = cls(blocks=unloaded.blocks, pretrained_model_name_or_path=folder, modular_config_dict=dict(index))
        loaded = {name: load_other(other, f"{folder}/{name}") for name, other in others.items()}
        pipeline.register_components(**models, **loaded)
        # Where its files lie says nothing of a pipeline, and checkpoints of a request go to other machines.
        pipeline.register_to_config(**{name: tuple(pipeline.config[name])[:2] for name in (*models, *loaded)})
        return pipeline

    call.__signature__ = signature_of(arguments)  # type: ignore[attr-defined]
    call.__doc__ = docstring_of(arguments)
    members = {
        "__module__": base.__module__,
        "__call__": call,
        "from_pretrained": classmethod(from_pretrained),
        "encode_block": encode_block,
        "set_progress_bar_config": set_progress_bar_config,
        "model_cpu_offload_seq": order_of_use(blocks),
        "output_class": output_class,
        "needs_mask": all("mask_image" in names for names in inputs_of_workflows(blocks) if "image" in names),
    }
    return type(base.__name__, (base,), members)


def output_of(name: str, blocks: ModularPipelineBlocks, fields: set[str]) -> type[BaseOutput]:
    """Raises CheckpointError."""
    found = OUTPUTS.get(frozenset(fields))
    if found is None:
        raise CheckpointError(
            f"the blocks of {name} make {', '.join(param.name for param in blocks.outputs) or 'nothing'}: "
            f"what is served makes images, videos or sound"
        )
    return found


def set_guiders(pipeline: Any, values: Mapping[tuple[str, str], Any]) -> None:
    """In place: a request's guiders are its own, and what it keeps of them is known by the object."""
    for name in {guider for guider, _ in values}:
        guider = getattr(pipeline, name)
        changed = {setting: value for (of, setting), value in values.items() if of == name}
        guider.__dict__.update(guider.new(**changed).__dict__)


def lays_over_picture(pipeline: Any, passed: Mapping[str, Any]) -> bool:
    """Whether the blocks lay what they made over the picture that was given: they do so with pictures only."""
    always = any(isinstance(each, InpaintProcessor) for each in vars(pipeline).values())
    return passed.get("mask_image") is not None and (always or passed.get("padding_mask_crop") is not None)


def encode_block(self: Any, path: str, values: dict[str, Any]) -> list[Change]:
    """Runs one block that only encodes; recorded, replayed and called remotely as `encode_prompt` of others is."""
    return changes_by(dict(leaves(self._blocks))[path], self, values)


def set_progress_bar_config(self: Any, **config: Any) -> None:
    """The pipeline's own method does not reach loops inside blocks."""
    for _, block in leaves(self._blocks):
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(**config)


def load_other(cls: Any, folder: str) -> Any:
    """A component without weights."""
    # The classes that choose another by a file might ask on the terminal whether to run the folder's code.
    trust = {"trust_remote_code": False} if cls.__name__.startswith("Auto") else {}
    return cls.from_pretrained(folder, local_files_only=True, **trust)
