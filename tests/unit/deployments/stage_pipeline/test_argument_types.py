"""The types of a pipeline's arguments, from annotations of every kind that pipelines have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from deployments.messages import ANY_VALUE, ValueType
from deployments.stage_pipeline.argument_types import argument_types, as_taken, call_inputs, parameter_type, value_type
from deployments.stage_pipeline.description import call_parameters

INT, FLOAT, STR, NONE = (ValueType(kind) for kind in ("int", "float", "str", "none"))
PICTURE, TENSOR, OBJECT = (ValueType(kind) for kind in ("picture", "tensor", "object"))


class Mode(Enum):
    A = 1


def union(*choices: ValueType) -> ValueType:
    return ValueType("union", choices)


@pytest.mark.parametrize(
    ("annotation", "wanted"),
    [
        (int, INT),
        (Optional[float], union(FLOAT, NONE)),  # noqa: UP045  (pipelines write both)
        (str | list[str], union(STR, ValueType("list", (STR,)))),
        (tuple[int, int], ValueType("tuple", (INT, INT))),
        (tuple[int], ValueType("row", (INT,))),
        (tuple[int, ...], ValueType("row", (INT,))),
        (list, ValueType("list", (ANY_VALUE,))),
        (Iterable[int], ValueType("list", (INT,))),
        (list[float | None], ValueType("list", (union(FLOAT, NONE),))),
        (dict[str, Any], ValueType("dict", (ANY_VALUE,))),
        (Literal["first", "last"], ValueType("choice", choices=("first", "last"))),
        (Image.Image | np.ndarray | torch.FloatTensor | None, union(PICTURE, TENSOR, NONE)),
        (Callable[[int], None] | None, union(OBJECT, NONE)),
        (Mode, ValueType("choice", choices=(1,))),
        (Image.Image | str | Path, union(PICTURE, OBJECT)),
        (Any, ANY_VALUE),
    ],
    ids=str,
)
def test_an_annotation_is_read_as_data(annotation: Any, wanted: ValueType) -> None:
    assert value_type(annotation) == wanted


@pytest.mark.parametrize(
    ("annotation", "default", "wanted"),
    [
        (int, None, union(INT, NONE)),
        (int, 25.0, union(INT, FLOAT)),
        (tuple[int], (9, 18, 27), ValueType("row", (INT,))),
        (list[int], (1, 2), union(ValueType("list", (INT,)), ValueType("row", (INT,)))),
        (float, 1, FLOAT),
        (inspect.Parameter.empty, 3, INT),
        (inspect.Parameter.empty, None, ANY_VALUE),
        ("a name that is gone", "x", STR),
    ],
)
def test_a_default_is_a_value_that_its_argument_may_have(annotation: Any, default: Any, wanted: ValueType) -> None:
    kind = inspect.Parameter.KEYWORD_ONLY
    assert parameter_type(inspect.Parameter("x", kind, default=default, annotation=annotation)) == wanted


@pytest.mark.parametrize("pipeline", [FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_every_argument_of_a_pipeline_has_a_type(pipeline: type) -> None:
    parameters, _ = call_parameters(pipeline)
    types = argument_types(pipeline, parameters)
    assert types.keys() == parameters.keys()
    assert ANY_VALUE not in types.values()


def test_a_list_becomes_a_tuple_where_the_pipeline_takes_no_list() -> None:
    given = {"original_size": [512, 768], "prompt": ["a"], "target_size": None, "timesteps": [1], "unknown": [1]}
    assert as_taken(StableDiffusionXLPipeline, given) == given | {"original_size": (512, 768)}


def test_annotations_that_cannot_be_evaluated_hide_none_of_the_others() -> None:
    class Pipeline:
        def __call__(self, steps: int = 3, odd: NotThere = None) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    inputs = call_inputs(Pipeline)
    assert inputs["steps"].annotation is int
    assert parameter_type(inputs["odd"]) == ANY_VALUE
