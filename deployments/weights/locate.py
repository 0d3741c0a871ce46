"""Finds a checkpoint: a folder, `s3://bucket/prefix` or a repository of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from filelock import FileLock

from deployments.errors import CheckpointError
from deployments.weights.files import FILE_NAMES, INDEX, MODULAR_INDEX, S3_WEIGHTS, StoredForm, read_object, stored_form
from deployments.weights.modular import Source, gathered
from deployments.weights.s3 import S3_CAUSES, naming_the_cause, object_opener, s3_client
from deployments.weights.single_file import unpack_single_file

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, tokenizers, indexes of shards
ETAGS = ".etags.json"  # in a folder pulled from S3: path -> ETag of the object it was made from


def resolve_checkpoint(
    model: str,
    cache_root: Path,
    components: Collection[str] | None = None,
    use_streamer: bool = True,
    variant: str | None = None,
    config_folder: str | None = None,
) -> Path:
    """The local folder of a checkpoint: `model` is a folder or a file here, `s3://bucket/prefix`, or a hub repository.

    Configurations and tokenizers of all components are brought there; weights only of `components` (None: of
    all), of `variant` where there is a choice. With `use_streamer`, weights in S3 that can be streamed stay there. Hub
    repositories are kept in huggingface_hub's own cache. `config_folder` has the settings that a single file lacks.

    Raises CheckpointError, naming the cause.
    """
    try:
        if config_folder is not None and not local_path(model).is_file():
            raise CheckpointError(f"config_folder is for a single file, and {model} is none: leave it out")
        if model.startswith("s3://"):
            folder = pull_from_s3(model.rstrip("/"), cache_root, components, use_streamer, variant)
        elif (here := local_path(model)).is_dir():
            folder = here
        elif here.exists():
            folder = unpack(here, config_folder, cache_root)
        elif is_repository(model):
            folder = pull_from_hub(model, components, variant)
        else:
            raise CheckpointError(f"{model!r} is neither a folder here, nor s3://bucket/prefix, nor a hub repository")
        if not (folder / INDEX).is_file():
            if not (folder / MODULAR_INDEX).is_file():
                raise CheckpointError(f"{model} has no {INDEX}: it is not a checkpoint of a diffusers pipeline")
            folder = gathered(folder, cache_root, partial(fetch_component, components, variant))
    except OSError as error:
        raise CheckpointError(f"{error.filename or model} cannot be used: {error.strerror or error}") from error
    return folder


def fetch_component(components: Collection[str] | None, variant: str | None, source: Source) -> Path:
    """The folder of a modular pipeline's component that lies apart, as `resolve_checkpoint` finds that of a model."""
    assert source.address is not None
    if (here := local_path(source.address)).is_dir():
        return here
    if not is_repository(source.address):
        raise CheckpointError(
            f"{MODULAR_INDEX} takes {source.component} from {source.address!r}, which is neither a folder here nor a "
            "repository of the Hugging Face hub"
        )
    needed = {source.subfolder} if components is None or source.component in components else set()
    return pull_from_hub(source.address, needed, source.variant or variant, source.revision)


def is_repository(model: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not model.startswith(".")


def unpack(file: Path, config_folder: str | None, cache_root: Path) -> Path:
    if config_folder is None:
        raise CheckpointError(
            f"{file} is a single file, which holds no settings and no tokenizers: name the folder of a diffusers "
            "pipeline of its kind that has them with `config_folder:` in the `args`, or serve a folder"
        )
    settings = local_path(config_folder)
    if not (settings / "model_index.json").is_file():
        raise CheckpointError(f"config_folder: {settings} has no model_index.json: it is no folder of a pipeline")
    return unpack_single_file(file, settings, cache_root)


def local_path(model: str) -> Path:
    """Raises CheckpointError for the home of a user who does not exist."""
    try:
        return Path(model).expanduser().absolute()
    except RuntimeError as error:
        user = model.partition("/")[0]
        raise CheckpointError(f"{model!r} cannot be found: no home folder is known for {user!r}") from error


def pull_from_hub(
    model: str, components: Collection[str] | None, variant: str | None, revision: str | None = None
) -> Path:
    try:
        folder = Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(SMALL_FILES)))
        weights = weights_to_fetch(hub_files(model, folder), folder, components, variant)
        patterns = [*SMALL_FILES, *weights]
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError
        raise CheckpointError(f"{model} is not a folder here, and the Hugging Face hub says: {error}") from error


def hub_files(model: str, snapshot: Path) -> list[str]:
    """The paths of a repository's files; without the hub, of those that were fetched before."""
    try:
        return huggingface_hub.HfApi().list_repo_files(model, revision=snapshot.name)
    except OSError:
        return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]


def weights_to_fetch(
    paths: Collection[str], folder: Path, components: Collection[str] | None, variant: str | None
) -> dict[str, StoredForm]:
    """Of the files at `paths`, those with weights of the components, each with the form it belongs to.

    A component is the folder of its name; the empty name is that of a repository that is one component.

    `folder` has their indexes of shards already.
    """
    here: dict[str, set[str]] = {}
    for path in map(PurePosixPath, paths):
        component = path.parts[0] if len(path.parts) == 2 else ""
        is_of_all = components is None and component != ""
        if len(path.parts) <= 2 and (is_of_all or component in (components or ())):
            here.setdefault(component, set()).add(path.name)
    chosen: dict[str, StoredForm] = {}
    for component, names in sorted(here.items()):
        for library in FILE_NAMES:
            if form := stored_form(library, names, variant):
                indexed = read_object(folder / component / form.name)["weight_map"].values() if form.is_sharded else ()
                chosen |= {f"{component}/{name}".lstrip("/"): form for name in (indexed or [form.name])}
    return chosen


def pull_from_s3(
    model: str, cache_root: Path, components: Collection[str] | None, use_streamer: bool, variant: str | None
) -> Path:
    bucket, _, prefix = model.removeprefix("s3://").partition("/")
    open_index(model)  # names the cause quickly if there is nothing to pull
    with naming_the_cause(model):
        client = s3_client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/".lstrip("/"))
        objects = {item["Key"].removeprefix(prefix).lstrip("/"): item["ETag"] for p in pages for item in p["Contents"]}
    objects = {path: tag for path, tag in objects.items() if is_below(path)}
    folder = cache_root / "weights" / ("s3-streamed" if use_streamer else "s3-downloaded") / bucket / prefix
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), naming_the_cause(model):
        small = {path: tag for path, tag in objects.items() if matches(path, SMALL_FILES)}
        download_changed(client, f"{bucket}/{prefix}", small, folder)
        weights = weights_to_fetch(objects, folder, components, variant)
        here = {path: tag for path, tag in objects.items() if path in weights}
        if use_streamer:
            here = {path: tag for path, tag in here.items() if weights[path].is_pickled}
        download_changed(client, f"{bucket}/{prefix}", here, folder)
        remove_gone(objects, folder)
        if use_streamer:
            note_weights_in_s3(model, objects, folder)
    return folder


def open_index(model: str) -> None:
    """Raises CheckpointError where neither index is there, with the cause of the classic one."""
    opened = object_opener()
    try:
        opened(f"{model}/{INDEX}")
    except CheckpointError as error:
        if S3_CAUSES["NoSuchKey"] not in str(error):
            raise
        with contextlib.suppress(CheckpointError):
            opened(f"{model}/{MODULAR_INDEX}")
            return
        raise


def download_changed(client: Any, root: str, wanted: Mapping[str, str], folder: Path) -> None:
    """The objects whose ETag differs from what was pulled before, each put in place whole."""
    bucket, _, prefix = root.partition("/")
    pulled = read_etags(folder)
    for path, tag in wanted.items():
        if pulled.get(path) != tag or not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{path}.partial"
            client.download_file(bucket, f"{prefix}/{path}".lstrip("/"), str(partial))
            partial.replace(folder / path)
            pulled[path] = tag
            write_json(folder / ETAGS, pulled)


def remove_gone(objects: Collection[str], folder: Path) -> None:
    pulled = read_etags(folder)
    for path in pulled.keys() - set(objects):
        (folder / path).unlink(missing_ok=True)
    write_json(folder / ETAGS, {path: tag for path, tag in pulled.items() if path in objects})


def read_etags(folder: Path) -> dict[str, str]:
    return read_object(folder / ETAGS) if (folder / ETAGS).exists() else {}


def note_weights_in_s3(model: str, objects: Collection[str], folder: Path) -> None:
    for component in {PurePosixPath(path).parent for path in objects if path.endswith(".safetensors")}:
        if (folder / component).is_dir():
            files = [PurePosixPath(path).name for path in objects if PurePosixPath(path).parent == component]
            write_json(folder / component / S3_WEIGHTS, {"address": f"{model}/{component}", "files": files})


def matches(path: str, patterns: Collection[str]) -> bool:
    return any(PurePosixPath(path).match(pattern) for pattern in patterns)


def is_below(path: str) -> bool:
    return not path.endswith("/") and ".." not in PurePosixPath(path).parts


def write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
