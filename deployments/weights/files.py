"""The files of a component's weights: which they are, what their headers declare, how ranges are read."""

from __future__ import annotations

import codecs
import json
import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.errors import CheckpointError
from deployments.weights.s3 import ObjectOpener, RangeReader, object_opener

INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"  # of a pipeline; the classic one comes first
S3_WEIGHTS = "s3_weights.json"  # in a component's folder: its weights are to be streamed from S3
LFS_POINTER = b"version https://git-lfs"
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format


@dataclass(frozen=True)
class FileNames:
    """What a library calls the files of a component's weights, each in the order from_pretrained looks for them."""

    safetensors: tuple[str, ...]  # the file, the index of shards
    pickled: tuple[str, ...]  # the same, written by torch.save


DIFFUSERS_FILES = FileNames(
    ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    ("diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model.bin"),
)
TRANSFORMERS_FILES = FileNames(
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
FILE_NAMES = (DIFFUSERS_FILES, TRANSFORMERS_FILES)


@dataclass(frozen=True)
class StoredForm:
    """In which of the forms that a library reads the weights of a component are stored."""

    name: str  # the file, or the index of its shards
    variant: str | None  # model.fp16.safetensors is the variant fp16
    is_pickled: bool

    @property
    def is_sharded(self) -> bool:
        return self.name.endswith(".json")


def stored_form(names: FileNames, here: Collection[str], variant: str | None = None) -> StoredForm | None:
    """The form that is read of the files `here`, None where there is none.

    Safetensors before what torch.save wrote; the variant that was asked for, then the plain files, then the only
    variant there is. Raises CheckpointError where several variants are left to choose from.
    """
    for candidates, is_pickled in ((names.safetensors, False), (names.pickled, True)):
        found: dict[str | None, str] = {}
        for plain in candidates:
            for name in sorted(here):
                matched = variant_in(name, plain)
                if matched is not NO_MATCH and matched not in found:
                    found[matched] = name
        wanted = next((each for each in (variant, None) if each in found), NO_MATCH)
        if wanted is NO_MATCH and len(found) > (0 if variant else 1):
            raise CheckpointError(
                f"the weights are there only in the variants {', '.join(sorted(map(str, found)))}"
                f"{f', not in {variant!r}' if variant else ''}: choose one of them with `variant:` in the `args`"
            )
        if found:
            chosen = next(iter(found)) if wanted is NO_MATCH else wanted
            return StoredForm(found[chosen], chosen, is_pickled)
    return None


NO_MATCH = "no match"  # of a name with a plain name


def variant_in(name: str, plain: str) -> str | None:
    """Which variant of the file `plain` a name is: None for the file itself, NO_MATCH for another."""
    if name == plain:
        return None
    stem, _, suffix = plain.rpartition(".")
    match = re.fullmatch(rf"{re.escape(stem)}\.([^.]+)\.{suffix}", name)
    is_variant = match is not None and not re.search(r"-\d+-of-\d+$", match[1])
    return match[1] if match and is_variant else NO_MATCH


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


def form_in(names: FileNames, folder: Path, variant: str | None = None) -> StoredForm:
    """The form in which a component's folder holds its weights, in S3 or here. Raises CheckpointError."""
    here = {path.name for path in folder.glob("*")} | set(in_s3(folder).get("files", ()))
    try:
        form = stored_form(names, here, variant)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if form is None:
        raise CheckpointError(f"{folder} holds none of {', '.join((*names.safetensors, *names.pickled))}")
    return form


def weight_files(names: FileNames, folder: Path, form: StoredForm | None = None) -> WeightFiles:
    """Reads the headers, so every file is there, whole and readable when this returns.

    `form` is one of safetensors; None: what `form_in` finds. Raises CheckpointError, naming the file and the cause.
    """
    form = form or form_in(names, folder)
    noted = in_s3(folder)
    locations = [f"{noted['address']}/{name}" if noted else str(folder / name) for name in file_names(form, folder)]
    if form.is_pickled:
        raise CheckpointError(f"{folder / form.name} was written by torch.save and was not converted to safetensors")
    open_object = object_opener() if noted else open_local_file
    files = WeightFiles(tuple(open_weight_file(location, open_object) for location in locations), form.is_sharded)
    if len(files.names) != len(set(files.names)):
        raise CheckpointError(f"{folder}: a weight is in more than one of its files")
    return files


def file_names(form: StoredForm, folder: Path) -> list[str]:
    """The file, or the shards that the index names; CheckpointError where one of these is nowhere."""
    if not form.is_sharded:
        return [form.name]
    index = folder / form.name
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: it is no index of shards")
    shards = sorted({str(name) for name in weight_map.values()})
    noted = in_s3(folder).get("files")
    for shard in shards:
        if not (shard in noted if noted else (folder / shard).is_file()):
            raise CheckpointError(f"{index} names the file {shard}, which is not there: fetch it, or the whole folder")
    return shards


def in_s3(folder: Path) -> dict[str, Any]:
    """Where a component's weights were left, and the names of its files there; empty where they are here."""
    return read_object(folder / S3_WEIGHTS) if (folder / S3_WEIGHTS).exists() else {}


def open_weight_file(location: str, open_object: ObjectOpener) -> WeightFile:
    """Raises CheckpointError where the file is not whole."""
    try:
        read, size = open_object(location)
        if size == 0:
            raise CheckpointError(f"{location} is empty: fetch it again")
        if read(0, min(size, len(LFS_POINTER))) == LFS_POINTER:
            raise CheckpointError(lfs_pointer_sentence(location))
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


def refuse_lfs_pointer(path: Path) -> None:
    """Raises CheckpointError for a file that git left in place of the real one."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(lfs_pointer_sentence(path))


def lfs_pointer_sentence(location: Path | str) -> str:
    return f"{location} is a pointer of git-lfs, not the file itself: run `git lfs pull` in the checkpoint's folder"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError, naming the file and the cause."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds {type(value).__name__}: fetch it again")
    return value


def read_json(path: Path) -> Any:
    """Raises CheckpointError, naming the file and the cause."""
    try:
        data = path.read_bytes()
        if data.startswith(codecs.BOM_UTF8):
            raise CheckpointError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
        if data.startswith(LFS_POINTER):
            raise CheckpointError(lfs_pointer_sentence(path))
        return json.loads(data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} cannot be read: it is not there") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        cause = "it is empty" if not data.strip() else f"it is no JSON: {error}"
        raise CheckpointError(f"{path} cannot be read: {cause}") from error
