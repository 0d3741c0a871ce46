"""Gathers the components of a modular pipeline, each of which may lie in another folder or repository."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.errors import CheckpointError
from deployments.weights.files import FILE_NAMES, MODULAR_INDEX, read_object, stored_form

SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".bin", ".pt", ".pth")
OF_WEIGHTS = (".safetensors", ".bin")  # in the names of their files and of the indexes of their shards


@dataclass(frozen=True)
class Source:
    """Where a component lies, as modular_model_index.json says it."""

    component: str
    address: str | None  # a folder or a repository of the hub; None: only the pipeline's own folder
    subfolder: str  # empty: the component is all of it
    revision: str | None
    variant: str | None


Fetch = Callable[[Source], Path]  # the folder that `address` stands for; raises CheckpointError


def gathered(folder: Path, cache_root: Path, fetch: Fetch) -> Path:
    """A folder that has each component under its name: `folder` itself, or one of links below `cache_root`.

    What lies in the pipeline's own folder is taken from there, whatever address the index gives, as diffusers does.
    Raises CheckpointError for a component that is nowhere.
    """
    index_file = folder / MODULAR_INDEX
    index = read_object(index_file)
    sources = [source_of(index_file, name, entry[2]) for name, entry in index.items() if is_component(entry)]
    found = {source.component: (where, source.variant) for source in sources if (where := place(folder, source, fetch))}
    if all(where == folder / name and variant is None for name, (where, variant) in found.items()):
        return folder
    links = {name: linked(where, variant) for name, (where, variant) in found.items()}
    return folder_of_links(cache_root / "weights" / "modular", index, links)


def is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)


def source_of(file: Path, name: str, said: dict[str, Any]) -> Source:
    """Raises CheckpointError where one of the words is no text."""
    fields = ("pretrained_model_name_or_path", "subfolder", "revision", "variant")
    address, subfolder, revision, variant = (said.get(field) or None for field in fields)
    for field, value in zip(fields, (address, subfolder, revision, variant), strict=True):
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{file} says {value!r} as {field} of {name}: it must be a text")
    if ".." in Path(subfolder or "").parts or Path(subfolder or "").is_absolute() or Path(name).name != name:
        raise CheckpointError(f"{file} takes {name} from {subfolder!r}: it must be a folder below the repository's")
    return Source(name, address, subfolder or "", revision, variant)


def place(folder: Path, source: Source, fetch: Fetch) -> Path | None:
    """The component's folder; None for one that the index leaves out."""
    own = folder / source.subfolder
    if source.subfolder and own.is_dir() and any(own.iterdir()):
        return own
    if source.address is None:
        return None
    if "://" in source.address or source.address.endswith(SINGLE_FILES):
        raise CheckpointError(
            f"{folder / MODULAR_INDEX} takes {source.component} from the single file {source.address}: save the "
            "component as a folder beside the index"
        )
    where = fetch(source) / source.subfolder
    if not where.is_dir():
        raise CheckpointError(f"{source.address} has no folder {source.subfolder!r} for {source.component}")
    return where


def linked(where: Path, variant: str | None) -> Path | dict[str, Path]:
    """The folder, or of a component of a variant the files that are read: its settings and the variant's weights."""
    if variant is None:
        return where
    names = {path.name for path in where.iterdir()}
    forms = [form for library in FILE_NAMES if (form := stored_form(library, names, variant))]
    read = {form.name for form in forms}
    for form in forms:  # shards may be in another process's cache only
        read |= set(read_object(where / form.name)["weight_map"].values()) if form.is_sharded else set()
    return {name: where / name for name in sorted(names) if name in read or not any(w in name for w in OF_WEIGHTS)}


def folder_of_links(root: Path, index: dict[str, Any], links: dict[str, Path | dict[str, Path]]) -> Path:
    """The same folder for the same index and links; several processes may make it at once."""
    digest = hashlib.sha256(json.dumps([index, links], sort_keys=True, default=str).encode()).hexdigest()
    target = root / digest[:32]
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as workplace:
        made = Path(workplace) / "made"
        made.mkdir()
        (made / MODULAR_INDEX).write_text(json.dumps(index), encoding="utf-8")
        for name, link in links.items():
            if isinstance(link, Path):
                (made / name).symlink_to(link.absolute(), target_is_directory=True)
                continue
            (made / name).mkdir()
            for file, place_of_file in link.items():
                (made / name / file).symlink_to(place_of_file.absolute())
        rename_unless_there(made, target)
    return target


def rename_unless_there(made: Path, target: Path) -> None:
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)
