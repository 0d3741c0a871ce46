"""Whether two folders hold the same component: configurations and every number are compared, no name is believed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.weights.files import (
    FILE_NAMES,
    S3_WEIGHTS,
    FileNames,
    WeightFile,
    form_in,
    open_local_file,
    read_json,
    stored_form,
    weight_files,
)
from deployments.weights.s3 import RangeReader

# Of a configuration: where it came from and what wrote it.
PROVENANCE = frozenset({"_name_or_path", "_commit_hash", "_diffusers_version", "transformers_version"})
STORED_DTYPE = frozenset({"dtype", "torch_dtype"})  # of no effect where a dtype is asked for
BLOCK = 16 * 1024**2  # bytes that are compared at a time


@dataclass(frozen=True)
class Stored:
    """Where a component is read from."""

    folder: Path
    names: FileNames
    variant: str | None = None
    file: str | None = None  # its weights, where they are in a GGUF file


def difference(one: Stored, other: Stored, is_dtype_chosen: bool = False) -> str | None:
    """What tells the two apart, in words; None: they are equal, number by number.

    Files that are one file (two links to it) are not read. Others are read to the first number that differs.
    `is_dtype_chosen`: the dtype that their configurations name is not asked for. Raises CheckpointError for files that
    cannot be read.
    """
    mine, theirs = (settings_in(each.folder, is_dtype_chosen) for each in (one, other))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"its {name} says otherwise"
    if one.file or other.file:
        return None if one.file and other.file and is_same_file(one.file, other.file) else "its weights are others"
    return different_weights(tensors_in(one), tensors_in(other))


def settings_in(folder: Path, is_dtype_chosen: bool) -> dict[str, Any]:
    """The JSON files of a component but for the indexes of shards, without what says only where they came from."""
    left_out = PROVENANCE | (STORED_DTYPE if is_dtype_chosen else frozenset())
    files = [path for path in folder.glob("*.json") if not path.name.endswith(".index.json")]
    return {path.name: without(read_json(path), left_out) for path in files if path.name != S3_WEIGHTS}


def without(value: Any, names: frozenset[str]) -> Any:
    """At any depth: a configuration may hold those of its parts."""
    if isinstance(value, dict):
        return {name: without(each, names) for name, each in value.items() if name not in names}
    return [without(each, names) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: what its header says of it, and where its bytes are."""

    file: WeightFile
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    num_bytes: int


def tensors_in(stored: Stored) -> dict[str, StoredTensor]:
    """By name, whichever shards they are in."""
    files = weight_files(stored.names, stored.folder, form_in(stored.names, stored.folder, stored.variant)).files
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), file.data_start + begin, end - begin)
        for file in files
        for name, entry in file.entries.items()
        for begin, end in [entry["data_offsets"]]
    }


def different_weights(one: dict[str, StoredTensor], other: dict[str, StoredTensor]) -> str | None:
    if one.keys() != other.keys():
        return f"its weights are others, such as {min(one.keys() ^ other.keys())}"
    pairs = [(name, one[name], other[name]) for name in one]
    for name, mine, theirs in pairs:  # before any file is read
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            return f"its {name} is {mine.dtype} {list(mine.shape)}, not {theirs.dtype} {list(theirs.shape)}"
    for name, mine, theirs in pairs:
        if is_one_place(mine, theirs):
            continue
        if mine.file.location.startswith("s3://") or theirs.file.location.startswith("s3://"):
            return "its weights stay in S3 at another address: they are not read twice to compare them"
        if not is_same_content(mine, theirs):
            return f"its {name} has other numbers"
    return None


def is_one_place(one: StoredTensor, other: StoredTensor) -> bool:
    return one.start == other.start and is_one_file(one.file.location, other.file.location)


def is_one_file(one: str, other: str) -> bool:
    """The same path or address, or two links to one file: those of the hub's cache lead to files by their SHA-256."""
    return one == other or (
        not one.startswith("s3://") and not other.startswith("s3://") and os.path.samefile(one, other)
    )


def is_same_content(one: StoredTensor, other: StoredTensor) -> bool:
    return same_blocks(one.file.read, one.start, other.file.read, other.start, one.num_bytes)


def is_same_file(one: str, other: str) -> bool:
    if is_one_file(one, other):
        return True
    (read, size), (read_other, other_size) = open_local_file(one), open_local_file(other)
    return size == other_size and same_blocks(read, 0, read_other, 0, size)


def same_blocks(read: RangeReader, start: int, read_other: RangeReader, other_start: int, num_bytes: int) -> bool:
    return all(read(start + at, length) == read_other(other_start + at, length) for at, length in blocks(num_bytes))


def blocks(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Where each begins, and its length."""
    for at in range(0, num_bytes, BLOCK):
        yield at, min(BLOCK, num_bytes - at)


def names_in(folder: Path, variant: str | None = None) -> FileNames | None:
    """What the library of the component calls its files; None: the folder holds no weights as safetensors.

    Raises CheckpointError where several variants are left to choose from.
    """
    here = {path.name for path in folder.glob("*")}
    for names in FILE_NAMES:
        form = stored_form(names, here, variant)
        if form is not None and not form.is_pickled:
            return names
    return None
