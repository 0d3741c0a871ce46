"""A checkpoint in one .safetensors file, unpacked once into a folder of a pipeline, by diffusers' own conversion."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    is_clip_model_in_single_file,
    is_t5_in_single_file,
    load_single_file_checkpoint,
)
from filelock import FileLock

from deployments.errors import CheckpointError
from deployments.weights.files import WeightFile, open_local_file, open_weight_file, read_object

UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SingleFileComponentError)
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def unpack_single_file(file: Path, config_folder: Path, cache_root: Path) -> Path:
    """The folder that holds the file's weights beside the settings and tokenizers of `config_folder`.

    It is made below `cache_root` when it is asked for the first time, and again when the file has changed. What the
    file lacks (FLUX files often hold the transformer alone) is taken from `config_folder`. Raises CheckpointError.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no .safetensors file: only these are read, they cannot run code; convert it")
    weights = open_weight_file(str(file), open_local_file)
    index = config_folder / "model_index.json"
    pipeline_class = getattr(diffusers, str(read_object(index).get("_class_name")), None)
    if not hasattr(pipeline_class, "from_single_file"):
        raise CheckpointError(f"{index} names a pipeline that diffusers cannot read from a single file")
    state = file.stat()
    said = index.read_text(encoding="utf-8")
    named = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {config_folder.resolve()} {said}"
    folder = cache_root / "weights" / "single-file" / f"{file.stem}-{hashlib.sha256(named.encode()).hexdigest()[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            convert(pipeline_class, file, config_folder, usual_dtype(weights), partial)
            partial.rename(folder)
    return folder


def convert(pipeline_class: Any, file: Path, config_folder: Path, dtype: torch.dtype | None, folder: Path) -> None:
    options = {"config": str(config_folder), "torch_dtype": dtype, "local_files_only": True}
    try:
        beside = parts_beside(file, config_folder, options)
        pipeline = pipeline_class.from_single_file(str(file), **options, **beside)
    except UNREADABLE as error:
        cause = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{file} cannot be read as a {pipeline_class.__name__} with the settings in {config_folder}: {cause}"
        ) from error
    for name, module in pipeline.components.items():
        if missing := missing_in(module):
            raise CheckpointError(f"{file} lacks {len(missing)} weights of {name}: {missing[0]} ...")
    pipeline.save_pretrained(folder)
    for part in folder.iterdir():  # as they were published: what a library made up would now look whole
        if part.is_dir() and not any(part.glob("*.safetensors*")):
            shutil.rmtree(part)
            if (config_folder / part.name).is_dir():
                shutil.copytree(config_folder / part.name, part)


def parts_beside(file: Path, config_folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The models that the file lacks and `config_folder` holds."""
    checkpoint = load_single_file_checkpoint(str(file), local_files_only=True)
    found = {}
    for name, entry in read_object(config_folder / "model_index.json").items():
        if isinstance(entry, list) and any((config_folder / name).glob("*.safetensors")):
            cls: Any = component_in(*entry)
            if cls is not None and not is_in(checkpoint, cls, file, name, options):
                found[name] = cls.from_pretrained(config_folder / name, torch_dtype=options["torch_dtype"])
    return found


def component_in(library: str, name: str) -> Any:
    return getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)


def is_in(checkpoint: Mapping[str, Any], cls: Any, file: Path, name: str, options: Mapping[str, Any]) -> bool:
    """Whether the file holds a model of this class, whole."""
    if not hasattr(cls, "from_single_file"):  # diffusers takes CLIP's and T5's text encoders out of such files
        is_t5 = cls.__name__ == "T5EncoderModel"
        return bool(is_t5_in_single_file(checkpoint) if is_t5 else is_clip_model_in_single_file(cls, checkpoint))
    try:
        return not missing_in(cls.from_single_file(str(file), **options, subfolder=name))
    except UNREADABLE:
        return False


def missing_in(component: Any) -> list[str]:
    return [key for key, tensor in tensors_of(component).items() if tensor.is_meta]


def tensors_of(component: Any) -> dict[str, torch.Tensor]:
    return component.state_dict() if isinstance(component, torch.nn.Module) else {}


def usual_dtype(weights: WeightFile) -> torch.dtype | None:
    """The dtype in which most of a file's numbers are stored."""
    num_elements: Counter[str] = Counter()
    for entry in weights.entries.values():
        num_elements[entry["dtype"]] += math.prod(entry["shape"])
    return FLOATING.get(max(num_elements, key=num_elements.__getitem__, default=""))
