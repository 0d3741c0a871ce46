"""Brings the file of an adapter here: from a file or a folder, from S3, or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from deployments.adapters.use import FEATURE, AdapterUse
from deployments.errors import AdapterReplacedError, CheckpointError, InvalidRequestError, StageUnavailableError
from deployments.weights.locate import Wanted, hub_files, is_repository, local_path, pull_from_hub, resolve_files
from deployments.weights.s3 import S3_CAUSES, naming_the_cause, s3_client

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MAX_FILE_BYTES = 8 * 1024**3  # far above any adapter: a whole model is none
MAX_FETCH_S = 3600.0
MAX_LISTED = 10_000  # objects below a prefix
MOST_NAMED = 20
CHUNK_BYTES = 4 * 1024**2
S3_TIMEOUTS: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 3}}
# What the operator must mend: to ask again does not help.
LASTING = (
    *S3_CAUSES.values(),
    "no credentials were found",
    "has no file",
    *(f"{status} Client Error" for status in (401, 403, 404)),
)

ANSWER = re.compile(r"the server answers \w+|\d{3} (Client|Server) Error")

Stamp = tuple[int, int]


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file on this machine."""

    path: Path
    digest: str  # SHA-256
    num_bytes: int
    stamp: Stamp | None = None  # from before its digest was made; None: a copy, which nobody replaces

    @property
    def is_as_it_was(self) -> bool:
        """Whether it has the content of its digest."""
        return self.path.is_file() if self.stamp is None else stamp_of(self.path) == self.stamp


def fetch_file(use: AdapterUse, cache_root: Path, max_disk_bytes: int | None = None) -> AdapterFile:
    """The file of the adapter. What comes from S3 is kept below `cache_root`, those used last in `max_disk_bytes`.

    Raises InvalidRequestError (param "loras") for a place without the file that is meant, AdapterReplacedError for one
    with another digest than `use.digest`; StageUnavailableError for one that cannot be reached now. What was here
    stays as it was.
    """
    try:
        if use.path.startswith("s3://"):
            file = from_s3(use, Store(cache_root / "adapters", max_disk_bytes))
        else:
            here = local_file(use)
            path = here or from_hub(use, cache_root)
            stamp = stamp_of(path) if here else None
            file = AdapterFile(path, digest_of(path), path.stat().st_size, stamp)
    except (CheckpointError, OSError) as error:
        logger.warning("the adapter %s at %s cannot be fetched: %s", use.name, use.path, error)
        raise told(use, error) from error
    if use.digest and file.digest != use.digest:
        raise AdapterReplacedError(
            f"the LoRA {use.name!r} cannot be used: its file was replaced: it has the SHA-256 {file.digest[:12]}, and "
            f"{use.digest[:12]} is asked for"
        )
    return file


def refusal(use: AdapterUse, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"the adapter {use.name!r} cannot be used: {why}", FEATURE)


def told(use: AdapterUse, error: Exception) -> Exception:
    """The error for a caller, who must not learn where the adapter lies."""
    if isinstance(error, OSError):
        return StageUnavailableError(f"the adapter {use.name!r} cannot be fetched now: {error.strerror or error}")
    cause = str(error)
    if lasting := next((each for each in LASTING if each in cause), None):
        return refusal(use, f"its place cannot be read: {lasting}")
    answer = ANSWER.search(cause)
    why = answer[0] if answer else "its place cannot be reached"
    return StageUnavailableError(f"the adapter {use.name!r} cannot be fetched now: {why}; the log says more")


# -- which file ---------------------------------------------------------------------------------------------


def local_file(use: AdapterUse) -> Path | None:
    """None where there is no such file or folder here."""
    here = local_path(use.path)
    if here.is_file():
        if here.suffix != SUFFIX:
            raise refusal(use, f"{here.name} is no {SUFFIX} file, and no other kind is read")
        if use.weight_name not in (None, here.name):
            raise refusal(use, f"weight_name is {use.weight_name}, and its path is the file {here.name}")
        return sized(use, here)
    if not here.is_dir():
        return None
    names = [path.name for path in here.iterdir() if path.is_file()]
    return sized(use, here / chosen_name(use, names))


def sized(use: AdapterUse, path: Path) -> Path:
    refuse_size(use, path.stat().st_size)
    return path


def refuse_size(use: AdapterUse, num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise refusal(use, f"its file has {num_bytes} bytes; an adapter has at most {MAX_FILE_BYTES}")


def chosen_name(use: AdapterUse, names: Collection[str]) -> str:
    """Of the files of a place the one that is meant. Raises InvalidRequestError."""
    found = sorted(name for name in names if name.endswith(SUFFIX))
    listed = ", ".join(found[:MOST_NAMED]) + (", ..." if len(found) > MOST_NAMED else "")
    if use.weight_name is not None:
        if use.weight_name not in found:
            raise refusal(use, f"its place has no file {use.weight_name}; there are {listed or f'no {SUFFIX} files'}")
        return use.weight_name
    if not found:
        raise refusal(use, f"its place has no {SUFFIX} file, and no other kind is read")
    if len(found) > 1:
        raise refusal(use, f"its place has several files: choose one with weight_name: {listed}")
    return found[0]


def from_hub(use: AdapterUse, cache_root: Path) -> Path:
    """Kept by huggingface_hub in its own cache, which it also reads where the hub cannot be reached."""
    if not is_repository(use.path):
        raise refusal(use, "its path is neither a file nor a folder here, nor s3://bucket/prefix, nor a hub repository")
    name = use.weight_name
    if name is None:
        names = hub_files(use.path, pull_from_hub(use.path, Wanted(()), None))
        name = chosen_name(use, [each for each in names if "/" not in each])
    [path] = resolve_files(use.path, [name], cache_root, use_streamer=False)
    return sized(use, path)


def stamp_of(path: Path) -> Stamp:
    """Of a file as it is now; (0, 0): there is none."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- S3 -----------------------------------------------------------------------------------------------------


def from_s3(use: AdapterUse, store: Store) -> AdapterFile:
    if use.digest and (here := store.find(use.digest)):
        return here
    bucket, _, place = use.path.removeprefix("s3://").rstrip("/").partition("/")
    client = s3_client(**S3_TIMEOUTS)
    with naming_the_cause(use.path):
        key, size, tag = chosen_object(use, client, bucket, place)
        refuse_size(use, size)
        source = f"{bucket}/{key} {tag} {size}"
        if here := store.found_before(source):
            return here
        body = client.get_object(Bucket=bucket, Key=key, IfMatch=tag)["Body"]
        with body:
            return store.take(source, body, size, until=time.monotonic() + MAX_FETCH_S)


def chosen_object(use: AdapterUse, client: Any, bucket: str, place: str) -> tuple[str, int, str]:
    """Its key, its bytes and its ETag."""
    is_file = place.endswith(SUFFIX)
    prefix = place if is_file else f"{place}/".lstrip("/")
    asked = {"Bucket": bucket, "Prefix": prefix, "PaginationConfig": {"MaxItems": MAX_LISTED}}
    pages = client.get_paginator("list_objects_v2").paginate(**asked)
    objects = {item["Key"].removeprefix(prefix): item for page in pages for item in page.get("Contents", ())}
    if is_file:
        if "" not in objects:
            raise CheckpointError(f"{use.path} cannot be read: {S3_CAUSES['NoSuchKey']}")
        name = PurePosixPath(place).name
        if use.weight_name not in (None, name):
            raise refusal(use, f"weight_name is {use.weight_name}, and its path is the file {name}")
        found = objects[""]
    else:
        found = objects[chosen_name(use, [name for name in objects if "/" not in name])]
    return found["Key"], int(found["Size"]), found["ETag"]


class Store:
    """Files by their digest in a folder that processes share; those used longest ago go where they are too many."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def find(self, digest: str) -> AdapterFile | None:
        path = self.folder / f"{digest}{SUFFIX}"
        with suppress(FileNotFoundError):
            os.utime(path)  # used now
            return AdapterFile(path, digest, path.stat().st_size)
        return None

    def found_before(self, source: str) -> AdapterFile | None:
        """What was made of a source: its place, its ETag and its size."""
        with suppress(FileNotFoundError):
            return self.find(self._note(source).read_text(encoding="ascii").strip())
        return None

    def take(self, source: str, body: Any, size: int, until: float) -> AdapterFile:
        """The file with the bytes of a stream. Raises OSError for one that ends too soon or lasts too long."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        partial = Path(name)
        try:
            sha, num_bytes = hashlib.sha256(), 0
            with os.fdopen(handle, "wb") as file:
                while chunk := body.read(CHUNK_BYTES):
                    sha.update(chunk)
                    num_bytes += len(chunk)
                    file.write(chunk)
                    if num_bytes > size:
                        break
                    if time.monotonic() > until:
                        raise OSError(f"it is not here after {MAX_FETCH_S:.0f} s")
            if num_bytes != size:
                raise OSError(f"{num_bytes} of {size} bytes came")
            digest = sha.hexdigest()
            path = self.folder / f"{digest}{SUFFIX}"
            with FileLock(self.folder / ".lock"):
                partial.replace(path)
                self._note(source).write_text(digest, encoding="ascii")
                self._make_room(kept=path)
        finally:
            partial.unlink(missing_ok=True)
        return AdapterFile(path, digest, size)

    def _note(self, source: str) -> Path:
        return self.folder / f"{hashlib.sha256(source.encode()).hexdigest()}.source"

    def _make_room(self, kept: Path) -> None:
        if self.max_bytes is None:
            return
        files = []
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                total -= size
