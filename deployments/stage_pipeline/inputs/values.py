"""Decoded files and objects of JSON as the pipeline takes them: PIL pictures, tensors, dataclasses, enumerations."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image

from deployments.messages import ValueType
from deployments.stage_pipeline.argument_types import call_inputs, is_record_class, record_fields, value_type
from deployments.stage_pipeline.inputs.docstrings import NO_DOC, parameter_docs

CHANNELS = 255  # of eight bits


@dataclass(frozen=True)
class Waveform:
    """Sound as samples [channels, time] in -1..1."""

    samples: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class TensorUse:
    """How a pipeline's code uses an argument that is annotated as a tensor and nothing else."""

    takes_pictures: bool  # it hands the argument to an image processor, or asks whether it is a picture
    told: tuple[str, ...]  # the dimensions of the tensor in the docstring: b, c, f, h, w, and t (samples of a sound)
    picture: tuple[str, ...]  # those of a lone picture, as the code reads them; empty: as it is told


def sound_format(pipeline: Any) -> tuple[int | None, int | None]:
    """Samples per second and channels of the sound that the pipeline works on; None where nothing says so."""
    configs = [getattr(component, "config", None) for component in getattr(pipeline, "components", {}).values()]
    owners = [pipeline, *(config for config in configs if config is not None)]
    return _first_number(owners, ("sample_rate", "sampling_rate")), _first_number(owners, ("audio_channels",))


def as_pipeline_takes(pipeline_class: type, name: str, value: Any) -> Any:
    """`value` holds plain values, PIL pictures and Waveforms, in lists and objects."""
    parameter = call_inputs_of(pipeline_class).get(name)
    if parameter is None:
        return value
    return _taken(value, parameter.annotation, functools.partial(_as_tensor, pipeline_class, name))


def rate_arguments(names: typing.Iterable[str]) -> list[str]:
    """Arguments that tell the pipeline the rate of a sound sent along."""
    return [name for name in names if re.search(r"(^|_)sampl(e|ing)_rate$", name)]


@functools.cache
def call_inputs_of(pipeline_class: type) -> dict[str, inspect.Parameter]:
    return call_inputs(pipeline_class)


def _taken(value: Any, annotation: Any, as_tensor: Any) -> Any:
    record, enumeration = _class_in(annotation, is_record_class), _class_in(annotation, _is_enumeration)
    if enumeration is not None and isinstance(value, str | int):
        return enumeration(value)
    if record is not None:
        return _as_record(value, record)
    return as_tensor(value, annotation)


def _as_record(value: Any, record: Any) -> Any:
    if isinstance(value, list):
        return [_as_record(each, record) for each in value]
    if not isinstance(value, dict):
        return value
    fields = record_fields(record)
    return record(
        **{
            name: _taken(each, fields[name].annotation, lambda v, a, name=name: _by_annotation(name, v, a))
            for name, each in value.items()
        }
    )


def _by_annotation(name: str, value: Any, annotation: Any) -> Any:
    wanted = value_type(annotation)
    is_tensor_only = wanted.holds("tensor") and not wanted.holds("picture", "any")
    return _tensor_of(name, value, _default_dims(value), False) if is_tensor_only else value


def _as_tensor(pipeline_class: type, name: str, value: Any, annotation: Any) -> Any:
    wanted = value_type(annotation) if not isinstance(annotation, str) else ValueType("any")
    if isinstance(value, list) and any(isinstance(each, Waveform) for each in value):
        return [_as_tensor(pipeline_class, name, each, annotation) for each in value]
    if isinstance(value, Waveform):
        dims = _use(pipeline_class, name).told or ("c", "t")
        return _tensor_of(name, value, dims, is_array=not _names_torch(annotation) and wanted.holds("tensor"))
    if not _holds_pictures(value) or not wanted.holds("tensor") or wanted.holds("picture", "any"):
        return value
    use = _use(pipeline_class, name)
    dims = (() if isinstance(value, list) else use.picture) or use.told or _default_dims(value)
    return value if use.takes_pictures else _tensor_of(name, value, dims, False)


@functools.cache
def _use(pipeline_class: type, name: str) -> TensorUse:
    code = inspect.getsource(pipeline_class)
    is_handed_on = rf"(preprocess\w*|encode_image|processor)\(\s*\[?{name}\s*[,\])]"
    is_asked = rf"isinstance\(\s*{name}(\[0\])?,[^)]*Image"
    takes_pictures = bool(re.search(f"{is_handed_on}|{is_asked}", code))
    docs = parameter_docs(inspect.getdoc(pipeline_class.__call__), call_inputs_of(pipeline_class))
    return TensorUse(takes_pictures, _dims_of_doc(docs.get(name, NO_DOC).shape), _dims_of_code(name, code))


def _dims_of_code(name: str, code: str) -> tuple[str, ...]:
    if re.search(rf"(\w+,\s*){{4}}\w+\s*=\s*{name}\.shape", code):
        return ("b", "c", "f", "h", "w")
    return ("b", "h", "w") if re.search(rf"\b{name}\.unsqueeze\(1\)", code) and "image" not in name else ()


def _dims_of_doc(shape: tuple[str, ...]) -> tuple[str, ...]:
    """By the words for each dimension; empty where one is not known."""
    words = (("b", "b"), ("num_c", "c"), ("c", "c"), ("h", "h"), ("w", "w"), ("audio", "t"), ("sample", "t"))
    has_sides = any(each.startswith("h") for each in shape)
    dims = []
    for each in shape:
        known = next((dim for word, dim in words if each.startswith(word)), None)
        if known is None and has_sides and each.startswith(("t", "f", "num_f")):
            known = "f"
        dims.append(known or "")
    return tuple(dims) if all(dims) else ()


def _default_dims(value: Any) -> tuple[str, ...]:
    if isinstance(value, Waveform):
        return ("c", "t")
    return ("b", "c", "f", "h", "w") if isinstance(value, list) else ("b", "c", "h", "w")


def _tensor_of(name: str, value: Any, dims: tuple[str, ...], is_array: bool) -> Any:
    """Pictures in 0..1, of one channel where the name says mask or depth; a batch of one."""
    known: tuple[str, ...]
    if isinstance(value, Waveform):
        samples = value.samples if "c" in dims else value.samples.mean(axis=0)
        known, array = ("c", "t") if "c" in dims else ("t",), samples
    elif _holds_pictures(value):
        mode = "L" if re.search(r"mask|depth", name) else "RGB"
        pictures = value if isinstance(value, list) else [value]
        stacked = np.stack([np.asarray(each.convert(mode)).reshape(each.height, each.width, -1) for each in pictures])
        array, known = stacked.astype(np.float32) / CHANNELS, ("f", "h", "w", "c")
    else:
        return value
    if is_array:
        return array[0] if array.ndim == 2 and len(array) == 1 else array
    return _laid_out(torch.from_numpy(np.ascontiguousarray(array)), known, dims)


def _laid_out(tensor: torch.Tensor, known: tuple[str, ...], dims: tuple[str, ...]) -> torch.Tensor:
    """The dimensions in the order of `dims`; what is not among them is the batch, or one of which there is one."""
    wanted = [dim for dim in dims if dim in known]
    others = [dim for dim in known if dim not in wanted]
    tensor = tensor.permute([known.index(dim) for dim in (*others, *wanted)])
    tensor = tensor.reshape(-1, *tensor.shape[len(others) :]) if others else tensor
    names = ["b", *wanted] if others else list(wanted)
    for index, dim in enumerate(dims):
        if dim not in names:
            tensor = tensor.unsqueeze(index)
            names.insert(index, dim)
    if "b" in names and "b" not in dims and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.contiguous()


def _class_in(annotation: Any, is_meant: Any) -> Any:
    """The first class of an annotation that is meant."""
    if is_meant(annotation):
        return annotation
    found = (_class_in(part, is_meant) for part in typing.get_args(annotation))
    return next((each for each in found if each is not None), None)


def _is_enumeration(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _names_torch(annotation: Any) -> bool:
    return (
        _class_in(annotation, lambda kind: isinstance(kind, type) and kind.__module__.startswith("torch")) is not None
    )


def _holds_pictures(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Image.Image)


def _first_number(owners: list[Any], names: tuple[str, ...]) -> int | None:
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((each for each in found if isinstance(each, int) and not isinstance(each, bool)), None)
