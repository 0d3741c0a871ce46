"""Loads one component of a checkpoint: the module that from_pretrained makes, streamed or mapped."""

from __future__ import annotations

import json
import logging
import math
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors.torch import load as load_safetensors
from transformers import PreTrainedModel

from deployments.errors import CheckpointError
from deployments.weights.containers import is_container, member_class, member_folders
from deployments.weights.files import (
    DIFFUSERS_FILES,
    TRANSFORMERS_FILES,
    FileNames,
    StoredForm,
    WeightFiles,
    form_in,
    in_s3,
    read_object,
    weight_files,
)
from deployments.weights.precision.chosen import Precision
from deployments.weights.precision.gguf_files import read_gguf
from deployments.weights.precision.scheme import Scheme
from deployments.weights.quantization.table import register_method
from deployments.weights.reading.diffusers_models import read_diffusers, read_quantised_diffusers
from deployments.weights.reading.mapped import map_tensors
from deployments.weights.reading.missing import refuse_missing_weights
from deployments.weights.reading.transformers_models import read_quantised_transformers, read_transformers
from deployments.weights.stream import STREAMER_VARIABLE, stream_tensors

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError)  # what a broken or foreign checkpoint raises

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # in safetensors

# Two streams from S3 in one process crash or lose tensors (runai-model-streamer 0.17), and both libraries
# switch the default dtype and torch's constructors for the whole process while they build a model.
one_load_at_a_time = threading.Lock()


def load_component(
    cls: type[torch.nn.Module],
    folder: Path | str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    use_streamer: bool,
    variant: str | None = None,
    precision: Precision | None = None,
) -> Any:
    """The module that `cls.from_pretrained(folder)` returns, on `device`, in evaluation mode.

    With `use_streamer` the Run:ai streamer reads the weights, from the folder or from S3; otherwise their files are
    mapped into memory. Both leave the same numbers in the same dtypes, and neither holds a model in the host's memory
    that is for another device. A quantised component is always read by its own quantiser (a row of QUANTIZERS, or one
    that the library has). `dtype` None means what it means to from_pretrained; `variant` as in `stored_form`.
    `precision` is one that is `ready` here, for a model that computes in `dtype`.

    Raises CheckpointError, naming the folder and the cause.
    """
    folder, device = Path(folder), torch.device(device)
    if is_container(cls):
        return load_container(cls, folder, dtype, device, use_streamer, variant, precision)
    read = reader(cls, folder, dtype, device, use_streamer, variant, precision)
    try:
        with one_load_at_a_time:
            module = read()
        refuse_missing_weights(module)
        return module.to(device).eval()
    except UNREADABLE as error:
        raise CheckpointError(f"{cls.__name__} in {folder} cannot be loaded: {error}") from error


def reader(
    cls: type[torch.nn.Module],
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    use_streamer: bool,
    variant: str | None,
    precision: Precision | None,
) -> Callable[[], Any]:
    """What reads the component. Raises CheckpointError for files that are not whole, or that nobody can read."""
    library = library_of(cls)
    quantised = is_quantised(folder)
    if precision and quantised:
        raise CheckpointError(
            f"{folder} is quantised already ({stored_method(folder) or 'by its config.json'}): leave out its precision"
        )
    if precision and precision.file is not None:
        assert dtype is not None
        return partial(read_gguf, cls, folder, Path(precision.file), dtype, device)
    form = form_in(library.files, folder, variant)
    if quantised and use_streamer:
        logger.info("%s is quantised: its quantiser reads the files, not the Run:ai streamer", folder)
    streams = use_streamer and not quantised
    if not streams and in_s3(folder):
        raise CheckpointError(f"{folder}: its weights were left in S3; {STREAMER_VARIABLE}=false downloads them")
    weights = weight_files(library.files, folder, form)  # raises for a file that is missing, cut, or not what it says
    if quantised:
        return partial(read_quantised, library, cls, folder, form, dtype, device)
    scheme = precision.scheme if precision else None
    return partial(library.read, cls, folder, weights, dtype, device, streams, scheme)


def read_quantised(
    library: Library, cls: Any, folder: Path, form: StoredForm, dtype: torch.dtype | None, device: torch.device
) -> Any:
    register_method(stored_method(folder))
    return library.read_quantised(cls, folder, form, dtype, device)


def load_container(
    cls: Any,
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    use_streamer: bool,
    variant: str | None,
    precision: Precision | None,
) -> Any:
    """As `load_component`, for a model made of others."""
    if precision and precision.file is not None:
        raise CheckpointError(f"precision: {cls.__name__} is made of several models, a GGUF file has one")
    members = [(member_class(each), each) for each in member_folders(folder)]
    loaded = [load_component(c, each, dtype, device, use_streamer, variant, precision) for c, each in members]
    try:
        return cls(loaded).eval()
    except UNREADABLE as error:
        raise CheckpointError(f"{cls.__name__} cannot be made of {len(members)} folders: {error}") from error


def is_quantised(folder: Path | str) -> bool:
    return "quantization_config" in read_object(Path(folder) / "config.json")


def stored_method(folder: Path | str) -> str | None:
    """The method of quantisation that a component's configuration names."""
    stored = read_object(Path(folder) / "config.json").get("quantization_config")
    return stored.get("quant_method") if isinstance(stored, dict) else None


def stored_variant(cls: type[torch.nn.Module], folder: Path, variant: str | None) -> str | None:
    """The variant that is read where `variant` is asked for. Raises CheckpointError."""
    return form_in(library_of(cls).files, folder, variant).variant


def stored_dtype(cls: type[torch.nn.Module], folder: Path | str, variant: str | None = None) -> torch.dtype | None:
    """The dtype in which most of a component's weights are stored.

    From its files, or, where another process has these, from the configuration that transformers writes; None where
    neither says it.
    """
    num_elements: Counter[torch.dtype] = Counter()
    try:
        for dtype, size in stored_sizes(library_of(cls).files, Path(folder), variant):
            num_elements[dtype] += size
    except CheckpointError:  # loading it says what is wrong
        num_elements.clear()
    if num_elements:
        return max(num_elements, key=num_elements.__getitem__)
    config = read_object(Path(folder) / "config.json")
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else None


def stored_sizes(names: FileNames, folder: Path, variant: str | None) -> Iterator[tuple[torch.dtype, int]]:
    """The dtype and the number of elements of each floating tensor."""
    form = form_in(names, folder, variant)
    for file in weight_files(names, folder, form).files:
        for entry in file.entries.values():
            if entry["dtype"] in FLOATING:
                yield FLOATING[entry["dtype"]], math.prod(entry["shape"])


def read_tensors(
    cls: type[torch.nn.Module], folder: Path | str, names: Collection[str], variant: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a component's files that have one of these names, without reading the others.

    Raises CheckpointError where the files are neither in the folder nor in S3.
    """
    folder, library_names = Path(folder), library_of(cls).files
    form = form_in(library_names, folder, variant)
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(library_names, folder, form).files:
        for name, entry in file.entries.items():
            if name in names:
                start, end = entry["data_offsets"]
                data = file.read(file.data_start + start, end - start)
                header = json.dumps({name: {**entry, "data_offsets": [0, end - start]}}).encode()
                found |= load_safetensors(struct.pack("<Q", len(header)) + header + data)
    return found


@dataclass(frozen=True)
class Library:
    """How the models of one library are stored and read."""

    model_class: type[torch.nn.Module]
    files: FileNames
    read: Callable[..., Any]  # class, folder, files, dtype, device, whether they are streamed, scheme
    read_quantised: Callable[..., Any]  # class, folder, form, dtype, device: what lies quantised in the folder


def read_diffusers_by(
    cls: Any,
    folder: Path,
    weights: WeightFiles,
    dtype: torch.dtype | None,
    device: torch.device,
    is_streamed: bool,
    scheme: Scheme | None,
) -> Any:
    tensors = stream_tensors if is_streamed else map_tensors
    return read_diffusers(cls, folder, weights, dtype, device, tensors, scheme)


LIBRARIES = (
    Library(ModelMixin, DIFFUSERS_FILES, read_diffusers_by, read_quantised_diffusers),
    Library(PreTrainedModel, TRANSFORMERS_FILES, read_transformers, read_quantised_transformers),
)


def library_of(cls: type[torch.nn.Module]) -> Library:
    for library in LIBRARIES:
        if issubclass(cls, library.model_class):
            return library
    raise CheckpointError(f"{cls.__name__} is neither a diffusers nor a transformers model")
