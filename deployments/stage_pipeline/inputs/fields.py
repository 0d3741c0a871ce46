"""The fields that a pipeline's arguments are sent by: type, default, bounds, need and description of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deployments.messages import MEDIA_TYPES, ArgumentNotes, ValueType
from deployments.stage_pipeline.argument_types import call_inputs, parameter_type
from deployments.stage_pipeline.inputs.docstrings import NO_DOC, ParameterDoc, parameter_docs
from deployments.stage_pipeline.inputs.kinds import Kind, kind_of

NUMBERS = ("int", "float")
# Whether these are needed is a matter of the task: deployments.stage_pipeline.tasks.
OF_THE_TASK = ("image", "mask_image", "video")


@dataclass(frozen=True)
class ArgumentField:
    """An argument as callers send it."""

    type: ValueType
    notes: ArgumentNotes
    is_needed: bool


def argument_fields(pipeline_class: type) -> dict[str, ArgumentField]:
    """Of all parameters of the pipeline's `__call__` that have a name, those among them that cannot be sent too."""
    inputs = call_inputs(pipeline_class)
    names = [name for name, each in inputs.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return fields_of(inputs, inspect.getdoc(pipeline_class.__call__), [name for name in names if name != "self"])


def fields_of(
    inputs: Mapping[str, inspect.Parameter], docstring: str | None, names: Iterable[str]
) -> dict[str, ArgumentField]:
    """Of the parameters `names`, by their annotations, defaults and the docstring of their call."""
    docs = parameter_docs(docstring, inputs)
    return {name: _field(name, inputs[name], docs.get(name, NO_DOC)) for name in names}


def _field(name: str, parameter: inspect.Parameter, doc: ParameterDoc) -> ArgumentField:
    kind = kind_of(name, parameter_type(parameter), doc)
    default = parameter.default if isinstance(parameter.default, bool | int | float | str) else None
    low, high = (doc.bounds if doc.bounds and kind.type.holds(*NUMBERS) else None) or (None, None)
    is_needed = parameter.default is parameter.empty or _is_needed(name, parameter, kind, doc)
    return ArgumentField(kind.type, ArgumentNotes(doc.description, default, low, high, kind.why_not), is_needed)


def _is_needed(name: str, parameter: inspect.Parameter, kind: Kind, doc: ParameterDoc) -> bool:
    """A file whose default None its annotation does not admit, and which no docstring calls optional.

    diffusers writes `control_image: PipelineImageInput = None` for what its pipeline cannot do without; of pictures
    that control it, some docstrings are wrong.
    """
    controls = "control" in name.split("_") and parameter_type(parameter).holds("picture")
    if name in OF_THE_TASK or parameter.default is not None or (doc.is_optional and not controls):
        return False
    if kind.why_not or not kind.type.holds(*MEDIA_TYPES):
        return False
    admits_none = parameter_type(parameter.replace(default=parameter.empty)).choices_of()
    return (bool(doc.type) or controls) and all(each.kind not in ("none", "any") for each in admits_none)
