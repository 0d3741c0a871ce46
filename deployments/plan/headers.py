"""What the files of a component declare, without their numbers: in a folder, in S3, or at the hub by range request."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from deployments.errors import CheckpointError
from deployments.weights.files import (
    FileNames,
    StoredForm,
    file_names,
    form_in,
    in_s3,
    read_object,
    stored_form,
    weight_files,
)

HUB_FOLDER = re.compile(r"/models--(?P<repository>[^/]+)/snapshots/(?P<revision>[^/]+)(?P<inside>/.*)?$")
READERS = 8  # headers that are fetched at once


@dataclass(frozen=True)
class Stored:
    """Of one component: bytes of its tensors, and how many numbers there are of each dtype as safetensors names it."""

    num_bytes: int
    elements: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> str | None:
        """That of most numbers: F32, BF16 ..."""
        return max(self.elements, key=self.elements.__getitem__) if self.elements else None


def read_stored(folder: Path, names: FileNames, variant: str | None = None) -> Stored:
    """Raises CheckpointError where the files are nowhere, or cannot be read."""
    place = HUB_FOLDER.search(folder.resolve().as_posix())
    if place and not in_s3(folder):
        return _at_hub(place, folder, names, variant)
    form = form_in(names, folder, variant)
    if form.is_pickled:
        return Stored(sum((folder / name).stat().st_size for name in file_names(form, folder)))
    files = weight_files(names, folder, form).files
    return _summed(
        (entry["dtype"], entry["shape"], entry["data_offsets"]) for file in files for entry in file.entries.values()
    )


def _at_hub(place: re.Match[str], folder: Path, names: FileNames, variant: str | None) -> Stored:
    """Only the headers of the files are fetched, from where HF_ENDPOINT says."""
    repository, revision = place["repository"].replace("--", "/"), place["revision"]
    inside = PurePosixPath((place["inside"] or "").strip("/"))
    try:
        sizes = _sizes(repository, revision)
        here = [path.name for path in map(PurePosixPath, sizes) if path.parent == inside]
        form = stored_form(names, here, variant)
        if form is None:
            raise CheckpointError(f"{repository} has no weights in {inside}")
        paths = [(inside / name).as_posix() for name in _names(form, folder)]
        if form.is_pickled:
            return Stored(sum(sizes[path] for path in paths))
        read = functools.partial(huggingface_hub.HfApi().parse_safetensors_file_metadata, repository, revision=revision)
        with ThreadPoolExecutor(READERS) as readers:
            headers = list(readers.map(read, paths))
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError
        raise CheckpointError(f"{repository}: the Hugging Face hub says: {error}") from error
    return _summed((t.dtype, t.shape, t.data_offsets) for header in headers for t in header.tensors.values())


@functools.cache
def _sizes(repository: str, revision: str) -> dict[str, int]:
    """Of the repository's files, by path."""
    tree = huggingface_hub.HfApi().list_repo_tree(repository, recursive=True, revision=revision)
    return {entry.path: entry.size for entry in tree if isinstance(entry, huggingface_hub.hf_api.RepoFile)}


def _names(form: StoredForm, folder: Path) -> list[str]:
    if not form.is_sharded:
        return [form.name]
    return sorted({str(name) for name in read_object(folder / form.name)["weight_map"].values()})


def _summed(entries: Iterable[tuple[str, Any, Any]]) -> Stored:
    elements: Counter[str] = Counter()
    num_bytes = 0
    for dtype, shape, (start, end) in entries:
        elements[str(dtype)] += math.prod(shape)
        num_bytes += end - start
    return Stored(num_bytes, dict(elements))
