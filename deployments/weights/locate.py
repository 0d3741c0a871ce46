"""Finds a checkpoint: a folder, `s3://bucket/prefix` or a repository of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
        if not model.startswith("s3://") and local_path(model).is_file():
            folder = unpack(local_path(model), config_folder, cache_root)
        else:
            folder = bring(model, cache_root, Wanted(components, proofs=(INDEX, MODULAR_INDEX)), use_streamer, variant)
        if not (folder / INDEX).is_file():
            if not (folder / MODULAR_INDEX).is_file():
                raise CheckpointError(f"{model} has no {INDEX}: it is not a checkpoint of a diffusers pipeline")
            folder = gathered(folder, cache_root, partial(fetch_component, components, variant))
    except OSError as error:
        raise CheckpointError(f"{error.filename or model} cannot be used: {error.strerror or error}") from error
    return folder


def resolve_part(
    address: str, subfolder: str, cache_root: Path, with_weights: bool, use_streamer: bool, variant: str | None
) -> Path:
    """The local folder of one component, which lies at `subfolder` ("": at the top) of a folder, of s3://bucket/prefix
    or of a hub repository. Raises CheckpointError, naming the cause.
    """
    wanted = Wanted((subfolder or ".",) if with_weights else ())
    folder = bring(address, cache_root, wanted, use_streamer, variant) / subfolder
    if not folder.is_dir():
        raise CheckpointError(f"{address} has no folder {subfolder!r}")
    return folder.resolve()


def resolve_files(address: str, names: Collection[str], cache_root: Path, use_streamer: bool) -> list[Path]:
    """The local paths of single files below `address`. Raises CheckpointError, naming the one that is not there."""
    folder = bring(address, cache_root, Wanted((), tuple(names)), use_streamer, None)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{address} has no file {missing[0]}")
    return [folder / name for name in names]


@dataclass(frozen=True)
class Wanted:
    """What is brought here of an address, beside the small files."""

    folders: Collection[str] | None  # whose weights, "." for the top; None: of all folders at the top
    files: tuple[str, ...] = ()
    proofs: tuple[str, ...] = ()  # files of which one must be there


def bring(address: str, cache_root: Path, wanted: Wanted, use_streamer: bool, variant: str | None) -> Path:
    """The local folder of an address that is no single file."""
    try:
        if address.startswith("s3://"):
            return pull_from_s3(address.rstrip("/"), cache_root, wanted, use_streamer, variant)
        if (here := local_path(address)).is_dir():
            return here
        if is_repository(address) and not here.exists():
            return pull_from_hub(address, wanted, variant)
    except OSError as error:
        raise CheckpointError(f"{error.filename or address} cannot be used: {error.strerror or error}") from error
    raise CheckpointError(f"{address!r} is neither a folder here, nor s3://bucket/prefix, nor a hub repository")


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
    is_needed = components is None or source.component in components
    wanted = Wanted((source.subfolder or ".",) if is_needed else ())
    return pull_from_hub(source.address, wanted, source.variant or variant, source.revision)


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


def pull_from_hub(model: str, wanted: Wanted, variant: str | None, revision: str | None = None) -> Path:
    try:
        folder = Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(SMALL_FILES)))
        weights = weights_to_fetch(hub_files(model, folder), folder, wanted.folders, variant)
        files = [re.sub(r"([*?[])", r"[\1]", name) for name in (*weights, *wanted.files)]
        patterns = [*SMALL_FILES, *files]
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
    """Of the files at `paths`, those with weights in the folders of the components, each with the form it belongs to.

    `folder` has their indexes of shards already.
    """
    here: dict[str, set[str]] = {}
    for path in map(PurePosixPath, paths):
        component = path.parent.as_posix()
        if component in components if components is not None else len(path.parts) == 2:
            here.setdefault(component, set()).add(path.name)
    chosen: dict[str, StoredForm] = {}
    for component, names in sorted(here.items()):
        for library in FILE_NAMES:
            if form := stored_form(library, names, variant):
                indexed = read_object(folder / component / form.name)["weight_map"].values() if form.is_sharded else ()
                chosen |= {below(component, name): form for name in (indexed or [form.name])}
    return chosen


def below(folder: str, name: str) -> str:
    return (PurePosixPath(folder) / name).as_posix()


def pull_from_s3(model: str, cache_root: Path, wanted: Wanted, use_streamer: bool, variant: str | None) -> Path:
    bucket, _, prefix = model.removeprefix("s3://").partition("/")
    if wanted.proofs:
        open_any(model, wanted.proofs)  # names the cause quickly if there is nothing to pull
    with naming_the_cause(model):
        client = s3_client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/".lstrip("/"))
        items = [item for page in pages for item in page.get("Contents", ())]
    objects = {item["Key"].removeprefix(prefix).lstrip("/"): item["ETag"] for item in items}
    if not objects:
        raise CheckpointError(f"{model} cannot be read: there is no such object")
    objects = {path: tag for path, tag in objects.items() if is_below(path)}
    folder = cache_root / "weights" / ("s3-streamed" if use_streamer else "s3-downloaded") / bucket / prefix
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), naming_the_cause(model):
        small = {path: tag for path, tag in objects.items() if matches(path, SMALL_FILES)}
        download_changed(client, f"{bucket}/{prefix}", small, folder)
        weights = weights_to_fetch(objects, folder, wanted.folders, variant)
        here = {path: tag for path, tag in objects.items() if path in weights}
        if use_streamer:
            here = {path: tag for path, tag in here.items() if weights[path].is_pickled}
        here |= {path: tag for path, tag in objects.items() if path in wanted.files}
        download_changed(client, f"{bucket}/{prefix}", here, folder)
        remove_gone(objects, folder)
        if use_streamer:
            note_weights_in_s3(model, objects, folder)
    return folder


def open_any(model: str, names: tuple[str, ...]) -> None:
    """Raises CheckpointError where none of the files is there, with the cause of the first."""
    first, *others = names
    opened = object_opener()
    try:
        opened(f"{model}/{first}")
    except CheckpointError as error:
        if S3_CAUSES["NoSuchKey"] not in str(error):
            raise
        for name in others:
            with contextlib.suppress(CheckpointError):
                opened(f"{model}/{name}")
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
            address = f"s3://{below(model.removeprefix('s3://'), component.as_posix())}"
            write_json(folder / component / S3_WEIGHTS, {"address": address, "files": files})


def matches(path: str, patterns: Collection[str]) -> bool:
    return any(PurePosixPath(path).match(pattern) for pattern in patterns)


def is_below(path: str) -> bool:
    return not path.endswith("/") and ".." not in PurePosixPath(path).parts


def write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.replace(path)
