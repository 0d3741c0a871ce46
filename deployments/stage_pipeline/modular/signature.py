"""The inputs of a modular pipeline's blocks, and the settings of its guiders, as the signature of one call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks

# Of every call; blocks that do not take them do without.
ALWAYS = {"output_type": "pil", "generator": None}
GUIDER = "guider"


@dataclass(frozen=True)
class Argument:
    """One argument of the call."""

    name: str
    annotation: Any
    default: Any  # inspect.Parameter.empty: it must be given
    description: str

    @property
    def parameter(self) -> inspect.Parameter:
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=self.annotation
        )


def call_arguments(blocks: ModularPipelineBlocks, guiders: Mapping[str, BaseGuidance]) -> list[Argument]:
    """All that a call takes: the inputs of the blocks, then the settings of the guiders under names of their own."""
    found = {argument.name: argument for argument in _inputs(blocks)}
    for name, (guider, setting) in guider_settings(guiders).items():
        value = guiders[guider].config[setting]
        found.setdefault(name, Argument(name, type(value), value, f"`{setting}` of the {guider}."))
    for name, default in ALWAYS.items():
        found.setdefault(name, Argument(name, inspect.Parameter.empty, default, ""))
    return list(found.values())


def guider_settings(guiders: Mapping[str, BaseGuidance]) -> dict[str, tuple[str, str]]:
    """Argument -> the guider and its setting: `guidance_scale` of `guider`, `guidance_scale_2` of `guider_2`."""
    return {
        guider.replace(GUIDER, setting): (guider, setting)
        for guider, component in guiders.items()
        for setting, value in component.config.items()
        if isinstance(value, bool | int | float) and not setting.startswith("_")
    }


def signature_of(arguments: list[Argument]) -> inspect.Signature:
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([own, *(argument.parameter for argument in arguments)])


def docstring_of(arguments: list[Argument]) -> str:
    """As diffusers writes them, for readers of the descriptions."""
    lines = [line for argument in arguments if argument.description for line in _described(argument)]
    return "\n".join(["Runs the blocks of the pipeline.", "", "Args:", *lines])


def inputs_of_workflows(blocks: ModularPipelineBlocks) -> list[dict[str, InputParam]]:
    """By name, of each workflow; of blocks that name none, of the blocks."""
    workflows = [blocks.get_workflow(name) for name in blocks._workflow_map] if blocks._workflow_map else [blocks]
    return [{param.name: param for param in workflow.inputs} for workflow in workflows]


def _inputs(blocks: ModularPipelineBlocks) -> Iterator[Argument]:
    """The blocks that are chosen by what is given say together what they need: each workflow says it alone."""
    in_workflows = inputs_of_workflows(blocks)
    for param in blocks.inputs:
        if param.name is None or param.name.startswith("_"):
            continue
        own = [params[param.name] for params in in_workflows if param.name in params] or [param]
        is_needed = len(own) == len(in_workflows) and all(each.required for each in own)
        default = inspect.Parameter.empty if is_needed else _same(each.default for each in own)
        description = next((each.description for each in (*own, param) if each.description), "")
        yield Argument(param.name, _annotation(param.type_hint, default), default, description)


def _same(defaults: Iterator[Any]) -> Any:
    first, *others = defaults
    return first if all(other == first for other in others) else None


def _annotation(hint: Any, default: Any) -> Any:
    """None is no value of an input, but stands for one that is left out."""
    if hint is None:
        return inspect.Parameter.empty
    return Optional[hint] if default is None else hint  # noqa: UP045  (some hints know no `|`)


def _described(argument: Argument) -> list[str]:
    kind = getattr(argument.annotation, "__name__", str(argument.annotation))
    optional = "" if argument.default is inspect.Parameter.empty else f", *optional*, defaults to {argument.default!r}"
    text = " ".join(argument.description.split())
    return [f"    {argument.name} (`{kind}`{optional}):", f"        {text}"]
