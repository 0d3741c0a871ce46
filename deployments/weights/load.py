"""Loads one component of a checkpoint: the module that from_pretrained makes, streamed or mapped."""

from __future__ import annotations

import json
import logging
import math
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers import ModelMixin
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin, no_init_weights
from safetensors.torch import load as load_safetensors
from transformers import GenerationConfig, PreTrainedModel

from deployments.errors import CheckpointError
from deployments.weights.containers import is_container, member_class, member_folders
from deployments.weights.files import (
    DIFFUSERS_FILES,
    TRANSFORMERS_FILES,
    FileNames,
    StoredForm,
    form_in,
    in_s3,
    read_object,
    weight_files,
)
from deployments.weights.quantization.table import register_method
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
) -> Any:
    """The module that `cls.from_pretrained(folder)` returns, on `device`, in evaluation mode.

    With `use_streamer` the Run:ai streamer reads the weights, from the folder or from S3; otherwise
    from_pretrained maps the files into memory. Both leave the same numbers in the same dtypes. A quantised
    component is always read by its own quantiser (a row of QUANTIZERS, or one that the library has). `dtype` None
    means what it means to from_pretrained; `variant` as in `stored_form`.

    Raises CheckpointError, naming the folder and the cause.
    """
    folder = Path(folder)
    if is_container(cls):
        return load_container(cls, folder, dtype, device, use_streamer, variant)
    library = library_of(cls)
    quantised = is_quantised(folder)
    form = form_in(library.files, folder, variant)
    if quantised and use_streamer:
        logger.info("%s is quantised: its quantiser reads the files, not the Run:ai streamer", folder)
    streams = use_streamer and not quantised
    if not streams and in_s3(folder):
        raise CheckpointError(f"{folder}: its weights were left in S3; {STREAMER_VARIABLE}=false downloads them")
    weight_files(library.files, folder, form)  # raises for a file that is missing, cut, or not what its name says
    load = library.stream if streams else library.map_files
    try:
        if quantised:
            register_method(stored_method(folder))
        with one_load_at_a_time:
            module = load(cls, folder, form, dtype, torch.device(device))
        refuse_missing_weights(module)
        return module.to(device).eval()
    except UNREADABLE as error:
        raise CheckpointError(f"{cls.__name__} in {folder} cannot be loaded: {error}") from error


def load_container(
    cls: Any,
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    use_streamer: bool,
    variant: str | None,
) -> Any:
    """As `load_component`, for a model made of others."""
    folders = member_folders(folder)
    loaded = [load_component(member_class(each), each, dtype, device, use_streamer, variant) for each in folders]
    try:
        return cls(loaded).eval()
    except UNREADABLE as error:
        raise CheckpointError(f"{cls.__name__} cannot be made of {len(folders)} folders: {error}") from error


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


def map_diffusers(cls: Any, folder: Path, form: StoredForm, dtype: torch.dtype | None, device: torch.device) -> Any:
    return all_read(cls.from_pretrained(str(folder), torch_dtype=dtype, **reading_options(form)))


def map_transformers(cls: Any, folder: Path, form: StoredForm, dtype: torch.dtype | None, device: torch.device) -> Any:
    return all_read(cls.from_pretrained(str(folder), dtype=dtype, weights_only=True, **reading_options(form)))


def reading_options(form: StoredForm) -> dict[str, Any]:
    return {
        "variant": form.variant,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }


def all_read(loaded: tuple[Any, dict[str, Any]]) -> Any:
    """The model, whose missing weights from_pretrained makes up at random. Raises ValueError where there are any."""
    model, info = loaded
    refuse_missing(sorted(info["missing_keys"]))
    return model


def stream_diffusers(cls: Any, folder: Path, form: StoredForm, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Tensor by tensor to the device, so that the host never holds the whole model."""
    model = construct_without_weights(cls, cls.load_config(folder), dtype)
    weights = weight_files(DIFFUSERS_FILES, folder, form)
    names = {name: name for name in weights.names}  # the model's name -> the file's
    if not weights.is_sharded:
        model._fix_state_dict_keys_on_load(names)  # attention blocks of old checkpoints
    name_in_model = {in_file: in_model for in_model, in_file in names.items()}
    expected = model.state_dict()
    report_unexpected(model, names.keys() - expected.keys(), folder)
    kept_in_fp32 = set(model._keep_in_fp32_modules or ())
    for name, tensor in stream_tensors(weights):
        name = name_in_model[name]
        if name in expected:
            wanted = dtype_in_model(name, tensor, expected[name].dtype, dtype, kept_in_fp32)
            assign(model, name, tensor.to(device=device, dtype=wanted, copy=True))
    model.register_to_config(_name_or_path=str(folder))
    return model


def stream_transformers(
    cls: Any, folder: Path, form: StoredForm, dtype: torch.dtype | None, device: torch.device
) -> Any:
    """Renamed keys, tied weights and dtypes are from_pretrained's own doing: it gets the streamed tensors."""
    weights = weight_files(TRANSFORMERS_FILES, folder, form)
    tensors = {name: tensor.clone() for name, tensor in stream_tensors(weights)}

    def give(read: Callable[..., Any], klass: Any, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if str(path) != str(folder):  # a part that has files of its own
            return read(klass, path, *args, config=config, **kwargs)
        config = config or klass.config_class.from_pretrained(path)
        return read(klass, None, *args, config=config, state_dict=tensors, **kwargs)

    with base_reading_replaced(give):
        model = all_read(cls.from_pretrained(folder, dtype=dtype, output_loading_info=True))
    model.config.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = read_generation_config(folder)
    return model


@contextmanager
def base_reading_replaced(replacement: Callable[..., Any]) -> Iterator[None]:
    """PreTrainedModel.from_pretrained becomes `replacement(read, cls, path, ...)`; `read` is the method as it was.

    Some classes override from_pretrained to choose another class or configuration (the T5GemmaEncoder of diffusers
    takes the encoder's part of its config): theirs is called as ever, only the base method that they call is another.
    """
    base: Any = PreTrainedModel
    reading = base.__dict__["from_pretrained"]
    base.from_pretrained = classmethod(partial(replacement, reading.__func__))
    try:
        yield
    finally:
        base.from_pretrained = reading


@dataclass(frozen=True)
class Library:
    """How the models of one library are stored and loaded."""

    model_class: type[torch.nn.Module]
    files: FileNames
    stream: Callable[..., Any]
    map_files: Callable[..., Any]


DIFFUSERS = Library(ModelMixin, DIFFUSERS_FILES, stream_diffusers, map_diffusers)
TRANSFORMERS = Library(PreTrainedModel, TRANSFORMERS_FILES, stream_transformers, map_transformers)
LIBRARIES = (DIFFUSERS, TRANSFORMERS)


def library_of(cls: type[torch.nn.Module]) -> Library:
    for library in LIBRARIES:
        if issubclass(cls, library.model_class):
            return library
    raise CheckpointError(f"{cls.__name__} is neither a diffusers nor a transformers model")


def construct_without_weights(cls: Any, config: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """As from_pretrained does: parameters on meta; buffers real, computed with `dtype` as the default."""
    if issubclass(cls, LegacyModelMixin):
        cls = _fetch_remapped_cls_from_config(config, cls)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default_dtype)
    try:
        with no_init_weights(), accelerate.init_empty_weights():
            return cls.from_config(config)
    finally:
        torch.set_default_dtype(default_dtype)


def dtype_in_model(
    name: str,
    tensor: torch.Tensor,
    constructed: torch.dtype,
    dtype: torch.dtype | None,
    kept_in_fp32: set[str],
) -> torch.dtype:
    """The rule of diffusers' load_model_dict_into_meta."""
    if dtype is None:
        return constructed
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if kept_in_fp32.intersection(name.split(".")) else dtype


def assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, the configuration says {list(old.shape)}")
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def refuse_missing_weights(module: torch.nn.Module) -> None:
    refuse_missing([name for name, tensor in module.state_dict().items() if tensor.is_meta])


def refuse_missing(missing: list[str]) -> None:
    if missing:
        raise ValueError(f"its files lack {len(missing)} weights: {', '.join(missing[:3])} ...")


def report_unexpected(model: Any, unexpected: Collection[str], folder: Path) -> None:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names = sorted(name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored))
    if names:
        logger.warning("%s: %d weights are not used: %s ...", folder, len(names), ", ".join(names[:3]))


def read_generation_config(folder: Path) -> Any:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
