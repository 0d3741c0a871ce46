"""Weights that torch.save wrote, turned into safetensors once: below the cache root, for all processes of a machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file

from deployments.errors import CheckpointError
from deployments.weights.files import (
    FILE_NAMES,
    FileNames,
    StoredForm,
    file_names,
    in_s3,
    open_local_file,
    open_weight_file,
    read_object,
    stored_form,
)
from deployments.weights.pickled import read_adapter, read_pickled

TO_DISK = (OSError, RuntimeError)  # what the writing raises: a full disk, a file that cannot be opened


def converted_component(folder: Path, cache_root: Path, variant: str | None = None) -> Path:
    """The folder itself, or one with the same files and its pickled weights as safetensors, if it holds only those.

    Raises CheckpointError for a file that holds more than tensors, by its name.
    """
    for names in FILE_NAMES:
        form = pickled_form(names, folder, variant)
        if form is not None:
            files = [folder / form.name, *(folder / name for name in file_names(form, folder))]

            def write(target: Path, names: FileNames = names, form: StoredForm = form) -> None:
                write_component(names, folder, form, target)

            return made_once(files, folder.name, cache_root, write)
    return folder


def converted_adapter(file: Path, cache_root: Path) -> Path:
    """An IP-Adapter's file as safetensors: the file itself, or what torch.save wrote in groups, under flat names.

    Raises CheckpointError for a file that is not whole or holds more than tensors.
    """
    if file.suffix == ".safetensors":
        open_weight_file(str(file), open_local_file)  # raises for one that is cut, or a pointer of git-lfs
        return file

    def write(target: Path) -> None:
        save(read_adapter(file), target / f"{file.stem}.safetensors")

    return made_once([file], file.stem, cache_root, write) / f"{file.stem}.safetensors"


def pickled_form(names: FileNames, folder: Path, variant: str | None) -> StoredForm | None:
    here = {path.name for path in folder.iterdir()} | set(in_s3(folder).get("files", ()))
    try:
        form = stored_form(names, here, variant)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if form is None or not form.is_pickled or not (folder / form.name).is_file():
        return None
    try:
        return form if all((folder / name).is_file() for name in file_names(form, folder)) else None
    except CheckpointError:  # shards that this process does not need were not fetched; loading says so if it does
        return None


def made_once(files: Sequence[Path], name: str, cache_root: Path, write: Callable[[Path], None]) -> Path:
    """A folder that `write` fills, made again when one of the files has changed; whole, or not there."""
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(states).encode()).hexdigest()[:12]
    folder = cache_root / "weights" / "converted" / f"{name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                write(partial)
            except TO_DISK as error:
                raise CheckpointError(f"{files[0]} cannot be converted to {folder}: {error}") from error
            partial.rename(folder)
    return folder


def write_component(names: FileNames, folder: Path, form: StoredForm, target: Path) -> None:
    """One shard after the other, so that memory holds one."""
    shards = file_names(form, folder)
    renamed = {shard: safetensors_name(names, shard) for shard in shards}
    for shard in shards:
        save(read_pickled([folder / shard]), target / renamed[shard])
    if form.is_sharded:
        index = read_object(folder / form.name)
        index["weight_map"] = {name: renamed[shard] for name, shard in index["weight_map"].items()}
        (target / safetensors_name(names, form.name)).write_text(json.dumps(index), encoding="utf-8")
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(stem(names.pickled)):
            (target / file.name).symlink_to(file.resolve())


def safetensors_name(names: FileNames, pickled: str) -> str:
    """pytorch_model.fp16-00001-of-00002.bin -> model.fp16-00001-of-00002.safetensors; so an index, too."""
    tail = pickled.removeprefix(stem(names.pickled)).replace(".bin.", ".safetensors.")
    return stem(names.safetensors) + (f"{tail.removesuffix('.bin')}.safetensors" if tail.endswith(".bin") else tail)


def stem(names: Sequence[str]) -> str:
    return names[0].partition(".")[0]


def save(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Tensors that share memory are written each by itself, as the libraries tie them again."""
    seen: set[int] = set()
    apart: dict[str, Any] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    save_file(apart, file, metadata={"format": "pt"})
