"""A checkpoint's folder as the stages read it: with the components that were named in place of its own or beside them.

The composed folder holds links and an index of its own, so that whatever reads a checkpoint reads it like any other.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
from filelock import FileLock

from deployments.errors import CheckpointError
from deployments.model import IPAdapterArgs, ModelArgs, PartArgs
from deployments.weights.converted import converted_adapter, converted_component
from deployments.weights.files import INDEX, MODULAR_INDEX, read_object
from deployments.weights.locate import resolve_checkpoint, resolve_files, resolve_part
from deployments.weights.parts.entries import entry_of, own_class
from deployments.weights.parts.ip_adapter import IMAGE_ENCODER, IPAdapters, loader_dtype
from deployments.weights.parts.pipeline_class import parameters_of, pipeline_for


def resolve_model(model: ModelArgs, cache_root: Path, needed: Collection[str] | None, use_streamer: bool) -> Path:
    """The local folder of what is served, with the weights of the components `needed` (None: of all).

    It is the checkpoint's own folder, or one below `cache_root` that joins it with the parts of `model.components` and
    with weights that had to be converted. Raises CheckpointError, naming the cause.
    """
    parts = model.components.parts
    own = None if needed is None else [name for name in needed if name not in parts]
    base = resolve_checkpoint(model.path, cache_root, own, use_streamer, model.variant, model.config_folder)
    index_name = INDEX if (base / INDEX).is_file() else MODULAR_INDEX
    index = read_object(base / index_name)
    folders = own_folders(base, index, set(parts))
    adapter = model.components.ip_adapter
    if index_name == MODULAR_INDEX:
        refuse_parts_of_modular(model)
    if parts or adapter or model.pipeline_class:
        found = {name: located(name, given, model, cache_root, needed, use_streamer) for name, given in parts.items()}
        index = merged_index(index, found, model.pipeline_class)
        folders |= {numbered(name, n): each for name, given in found.items() for n, each in enumerate(given or ())}
    ip_adapters = None
    if adapter:
        ip_adapters = brought_with(adapter, model, index, folders, cache_root, needed, use_streamer)
    folders = {name: folder for name, folder in folders.items() if belongs(name, index)}
    whole = {name: converted_component(folder, cache_root, model.variant) for name, folder in folders.items()}
    if whole == own_folders(base, index, ()) and index == read_object(base / index_name) and not ip_adapters:
        return base
    return linked(base.name, index_name, index, whole, ip_adapters, cache_root)


def refuse_parts_of_modular(model: ModelArgs) -> None:
    """Raises CheckpointError."""
    given = {
        "components": model.components.parts or model.components.ip_adapter,
        "pipeline_class": model.pipeline_class,
    }
    for setting, value in given.items():
        if value:
            raise CheckpointError(
                f"{setting}: a modular pipeline takes its components from where its {MODULAR_INDEX} says: "
                "change that, and leave the setting out"
            )


def own_folders(base: Path, index: Mapping[str, Any], without: Collection[str]) -> dict[str, Path]:
    """The checkpoint's folders of components, several of one container among them (controlnet, controlnet_1)."""
    return {
        folder.name: folder
        for folder in base.iterdir()
        if folder.is_dir()
        and folder.name not in without
        and belongs(folder.name, index)
        # text_encoder_2 is no part of text_encoder, for the index names it; controlnet_1 is one of controlnet
        and (folder.name in index or not is_numbered(folder.name, without))
    }


def belongs(folder: str, names: Collection[str]) -> bool:
    """Whether a folder is that of a component among `names`, or of a later part of a container."""
    return folder in names or is_numbered(folder, names)


def located(
    name: str,
    given: Sequence[PartArgs] | None,
    model: ModelArgs,
    cache_root: Path,
    needed: Collection[str] | None,
    use_streamer: bool,
) -> list[Path] | None:
    with naming(f"components.{name}"):
        if given is None:
            return None
        with_weights = needed is None or name in needed
        return [
            resolve_part(part.path, part.subfolder, cache_root, with_weights, use_streamer, model.variant)
            for part in given
        ]


def merged_index(
    index: Mapping[str, Any], found: Mapping[str, Sequence[Path] | None], asked: str | None
) -> dict[str, Any]:
    """model_index.json of the pipeline that takes the parts. Raises CheckpointError."""
    own, kept = str(index.get("_class_name")), {name for name in index if not name.startswith("_")}
    added: dict[str, type | None] = {}
    for name, folders in found.items():
        with naming(f"components.{name}"):
            classes = {own_class(folder) for folder in folders or ()}
            if len(classes) > 1:
                raise CheckpointError("a list must have parts of one class")
            if folders and not replaces(index.get(name), *classes):
                added[name] = classes.pop()
    pipeline_class = pipeline_for(own, added, kept, asked)
    parameters = parameters_of(pipeline_class)
    merged = {name: value for name, value in index.items() if name.startswith("_") or name in parameters}
    merged["_class_name"] = pipeline_class.__name__
    for name, folders in found.items():
        if folders is None:
            check_optional(name, pipeline_class)
            merged[name] = [None, None]
        else:
            merged[name] = entry_of(name, folders, index.get(name), pipeline_class)
    return merged


def replaces(before: Any, cls: type | None) -> bool:
    """Whether a part stands for the checkpoint's own component: of the same class, or an autoencoder for another."""
    if not isinstance(before, list) or before == [None, None]:
        return False
    return cls is None or cls.__name__ == before[1] or (decodes(cls) and decodes(getattr(diffusers, before[1], None)))


def decodes(cls: Any) -> bool:
    return callable(getattr(cls, "decode", None))


def check_optional(name: str, pipeline_class: Any) -> None:
    parameters = parameters_of(pipeline_class)
    optional = {*getattr(pipeline_class, "_optional_components", ())}
    optional |= {each for each, parameter in parameters.items() if parameter.default is None}
    if name not in parameters or name not in optional:
        raise CheckpointError(
            f"components.{name}: {pipeline_class.__name__} cannot go without it; what it can go without: "
            f"{', '.join(sorted(optional & parameters.keys())) or 'nothing'}"
        )


def brought_with(
    adapter: IPAdapterArgs,
    model: ModelArgs,
    index: dict[str, Any],
    folders: dict[str, Path],
    cache_root: Path,
    needed: Collection[str] | None,
    use_streamer: bool,
) -> IPAdapters:
    """The adapters' files; the image encoder that they need joins `index` and `folders` if the pipeline has none."""
    pipeline_class = pipeline_for(str(index["_class_name"]), {}, index, None)
    with naming("components.ip_adapter"):
        if not hasattr(pipeline_class, "load_ip_adapter"):
            raise CheckpointError(f"{pipeline_class.__name__} takes no IP-Adapters")
        names = ["/".join(part for part in (adapter.subfolder, name) if part) for name in adapter.weight_names]
        files = resolve_files(adapter.path, names, cache_root, use_streamer)
        files = [converted_adapter(file, cache_root) for file in files]
    lacks = IMAGE_ENCODER in parameters_of(pipeline_class) and index.get(IMAGE_ENCODER) in (None, [None, None])
    brings = lacks and IMAGE_ENCODER not in model.components.parts
    if brings:
        reader = adapter.reader
        with naming("components.ip_adapter.image_encoder"):
            with_weights = needed is None or IMAGE_ENCODER in needed
            folder = resolve_part(reader.path, reader.subfolder, cache_root, with_weights, use_streamer, model.variant)
            index[IMAGE_ENCODER] = entry_of(IMAGE_ENCODER, [folder], None, pipeline_class)
        folders[IMAGE_ENCODER] = folder
    return IPAdapters(tuple(map(str, files)), adapter.scales, brings, loader_dtype(pipeline_class))


def linked(
    name: str,
    index_name: str,
    index: Mapping[str, Any],
    folders: Mapping[str, Path],
    adapters: IPAdapters | None,
    cache_root: Path,
) -> Path:
    """The folder that joins them; made once, for all processes of a machine."""
    links = {each: str(folder.absolute()) for each, folder in sorted(folders.items())}
    key = hashlib.sha256(json.dumps([links, index, adapters and asdict(adapters)]).encode()).hexdigest()[:12]
    composed = cache_root / "weights" / "composed" / f"{name}-{key}"
    composed.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{composed}.lock"):
        if not composed.is_dir():
            partial = composed.with_name(f"{composed.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for each, folder in links.items():
                (partial / each).symlink_to(folder)
            (partial / index_name).write_text(json.dumps(index, indent=2), encoding="utf-8")
            if adapters:
                adapters.write(partial)
            partial.rename(composed)
    return composed


def numbered(name: str, number: int) -> str:
    """As the containers of diffusers name the folders of what they hold: controlnet, controlnet_1 ..."""
    return name if number == 0 else f"{name}_{number}"


def is_numbered(folder: str, names: Collection[str]) -> bool:
    match = re.fullmatch(r"(.+)_\d+", folder)
    return match is not None and match[1] in names


@contextmanager
def naming(place: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(place) else f"{place}: {text}") from error
