"""Outputs of every class of the libraries are rebuilt as they were, whichever of their fields are None."""

import dataclasses
import importlib
import pkgutil
from typing import Any

import diffusers.pipelines
import pytest
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils import BaseOutput
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import map_values

CPU = torch.device("cpu")


def of_pipelines() -> list[type]:
    """The outputs in the modules that pipelines keep for them alone: they import no model."""
    found: dict[str, type] = {}
    for package in pkgutil.iter_modules(diffusers.pipelines.__path__):
        name = f"diffusers.pipelines.{package.name}.pipeline_output"
        if package.ispkg and importlib.util.find_spec(name) is not None:
            members = vars(importlib.import_module(name)).values()
            found |= {f"{c.__module__}.{c.__name__}": c for c in members if isinstance(c, type)}
    return [c for c in found.values() if issubclass(c, BaseOutput) and c is not BaseOutput]


OUTPUTS = [*of_pipelines(), DecoderOutput, BaseModelOutputWithPooling]


def fields(output: Any) -> dict[str, Any]:
    return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize("cls", OUTPUTS, ids=lambda cls: cls.__name__)
def test_an_output_comes_back_whichever_of_its_fields_are_none(cls: Any) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    for present in range(1, len(names) + 1):
        made = cls(**{name: torch.ones(2) if i < present else None for i, name in enumerate(names)})
        for copy in (map_values(lambda leaf: leaf, made), unpack(pack(made), CPU)):
            assert type(copy) is cls
            assert list(copy.keys()) == list(made.keys())
            assert all(same(getattr(copy, name), value) for name, value in fields(made).items())


def test_many_classes_of_outputs_are_among_them() -> None:
    assert len(OUTPUTS) > 30
    assert any(issubclass(cls, ModelOutput) for cls in OUTPUTS)


def test_a_lone_list_stays_a_list_and_is_not_read_as_fields() -> None:
    copy = map_values(lambda leaf: leaf, BaseModelOutputWithPooling(hidden_states=[("pooler_output", torch.ones(1))]))
    assert copy.pooler_output is None
    assert list(copy.keys()) == ["hidden_states"]
