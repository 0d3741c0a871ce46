"""The safetensors files of a component: which they are, what their headers declare, how ranges are read."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.errors import CheckpointError
from deployments.weights.s3 import ObjectOpener, RangeReader, object_opener

S3_WEIGHTS = "s3_weights.json"  # in a component's folder: its weights are to be streamed from S3
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


@dataclass(frozen=True)
class FileNames:
    """What a library calls the files of a component's weights."""

    weights: tuple[str, ...]  # the file or the index of shards, in the order from_pretrained looks for them
    shards: str

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the files that hold tensors."""
        return (*(name for name in self.weights if name.endswith(".safetensors")), self.shards)


DIFFUSERS_FILES = FileNames(
    ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    "diffusion_pytorch_model-?????-of-?????.safetensors",
)
TRANSFORMERS_FILES = FileNames(
    ("model.safetensors", "model.safetensors.index.json"),
    "model-?????-of-?????.safetensors",
)
FILE_NAMES = (DIFFUSERS_FILES, TRANSFORMERS_FILES)


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: what its header declares, and a reader of byte ranges."""

    location: str  # a path or an s3:// address
    read: RangeReader
    entries: dict[str, dict[str, Any]]  # name -> dtype, shape, data_offsets
    data_start: int


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one component."""

    files: tuple[WeightFile, ...]
    is_sharded: bool

    @property
    def names(self) -> list[str]:
        return [name for file in self.files for name in file.entries]

    @property
    def is_s3(self) -> bool:
        return self.files[0].location.startswith("s3://")


def weight_files(names: FileNames, folder: Path) -> WeightFiles:
    """Reads the headers, so every file is there, whole and readable when this returns.

    Raises CheckpointError, naming the file and the cause.
    """
    in_s3 = read_json(folder / S3_WEIGHTS) if (folder / S3_WEIGHTS).exists() else None
    here = {path.name for path in folder.glob("*")} | set(in_s3["files"] if in_s3 else ())
    found = next((name for name in names.weights if name in here), None)
    if found is None:
        raise CheckpointError(f"{folder} holds none of {', '.join(names.weights)}")
    is_sharded = found.endswith(".json")
    shards = sorted(set(read_json(folder / found)["weight_map"].values())) if is_sharded else [found]
    locations = [f"{in_s3['address']}/{name}" if in_s3 else str(folder / name) for name in shards]
    open_object = object_opener() if in_s3 else open_local_file
    files = WeightFiles(tuple(open_weight_file(location, open_object) for location in locations), is_sharded)
    if len(files.names) != len(set(files.names)):
        raise CheckpointError(f"{folder}: a weight is in more than one of its files")
    return files


def open_weight_file(location: str, open_object: ObjectOpener) -> WeightFile:
    """Raises CheckpointError where the file is not whole."""
    try:
        read, size = open_object(location)
        (header_size,) = struct.unpack("<Q", read(0, 8))
        if header_size > min(size, LARGEST_HEADER):
            raise ValueError(f"its header cannot have {header_size} bytes")
        entries: dict[str, dict[str, Any]] = dict(json.loads(read(8, header_size)))
        entries.pop("__metadata__", None)
        data_size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (OSError, ValueError, TypeError, LookupError, struct.error) as error:
        raise CheckpointError(f"{location} is not a safetensors file: {error}") from error
    if size != 8 + header_size + data_size:
        raise CheckpointError(f"{location} has {size} bytes, its header declares {8 + header_size + data_size}")
    return WeightFile(location, read, entries, 8 + header_size)


def open_local_file(path: str) -> tuple[RangeReader, int]:
    def read(start: int, length: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)

    return read, os.path.getsize(path)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
