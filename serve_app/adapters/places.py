"""Where POST /v1/loras may load from: folders, prefixes in S3, owners and repositories of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import AfterValidator

from deployments.errors import InvalidRequestError

S3 = "s3://"
HERE = "./"
SUFFIX = ".safetensors"
FORMS = "a folder (/srv/loras or ./loras), s3://bucket/prefix, or an owner or owner/repository of the hub"
# Of the machine as a whole: a folder in one of them may be a place.
TOO_WIDE = frozenset(
    (
        "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin",
        "/srv", "/sys", "/tmp", "/usr", "/var",
    )
)  # fmt: skip
OF_THE_SYSTEM = ("/proc/", "/sys/", "/dev/")
_PART = re.compile(r"[^\x00-\x1f\x7f\\\ud800-\udfff]{1,255}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,62}", re.ASCII)
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
MAX_PATH_CHARS = 1024
NOT_ALLOWED = "path: there is no such LoRA in the places that this server allows"


def check_place(place: str) -> str:
    """The place without a slash at its end. Raises ValueError for one that is none, or too wide."""
    place = place.rstrip("/") if len(place) > 1 else place
    parts = _parts(place)
    if place in ("", "/", ".", "~", "s3:") or place in TOO_WIDE or place.startswith(OF_THE_SYSTEM):
        raise ValueError(f"{place!r} is too wide, or belongs to the system: name a folder that holds LoRAs only")
    if parts is None or not _is_place(place, parts):
        raise ValueError(f"{place!r} must be {FORMS}, without '..'")
    return place


AdapterPlace = Annotated[str, AfterValidator(check_place)]


def _is_place(place: str, parts: list[str]) -> bool:
    if is_folder(place):
        return True
    if place.startswith(S3):
        return bool(_BUCKET.fullmatch(parts[0]))
    return len(parts) <= 2 and all(_HUB.fullmatch(part) for part in parts)


def is_folder(place: str) -> bool:
    return place.startswith(("/", HERE))


def lies_in(path: str, places: Sequence[str]) -> bool:
    """Whether an address lies in one of the places by its parts alone; of files see `find`."""
    parts = _parts(path)
    return parts is not None and any(
        parts[: len(wanted)] == wanted and _kind(path) == _kind(place)
        for place in places
        if (wanted := _parts(place)) is not None
    )


def find(path: str, weight_name: str | None, places: Sequence[str]) -> str:
    """The address of what a caller means by `path`: of a file here, in S3, or of a repository.

    A path without a slash at its begin is one in a folder among the places, or a repository. Reads folders: not for
    an event loop. Raises InvalidRequestError, which tells nothing of what lies outside of the places.
    """
    parts = _parts(path) if len(path) <= MAX_PATH_CHARS else None
    if parts is None or (":" in path and not path.startswith(S3)):
        raise InvalidRequestError(NOT_ALLOWED, "path")
    folders = [place for place in places if is_folder(place)]
    if path.startswith(S3):
        if lies_in(path, places):
            return path.rstrip("/")
        raise InvalidRequestError(NOT_ALLOWED, "path")
    for candidate in [path] if path.startswith("/") else [os.path.join(folder, *parts) for folder in folders]:
        if lies_in(candidate, folders) and os.path.exists(candidate):
            return _file_at(candidate, weight_name, folders)
    if not path.startswith("/") and len(parts) == 2 and lies_in(path, places):
        return path
    raise InvalidRequestError(NOT_ALLOWED, "path")


def _file_at(candidate: str, weight_name: str | None, folders: Sequence[str]) -> str:
    """The file itself; neither it nor a folder on its way may lead out of the places."""
    if os.path.isdir(candidate):
        names = [weight_name] if weight_name else list(_weights_in(candidate)) if _is_real(candidate, folders) else []
        if len(names) > 1:
            raise InvalidRequestError(
                f"weight_name is required: {len(names)} files are there, among them {', '.join(names[:5])}",
                "weight_name",
                "missing_required_parameter",
            )
        candidate = os.path.join(candidate, names[0]) if names else candidate
    elif weight_name is not None and os.path.basename(candidate) != weight_name:
        raise InvalidRequestError("give weight_name only where path is no file", "weight_name")
    if not candidate.endswith(SUFFIX) or not os.path.isfile(candidate) or not _is_real(candidate, folders):
        raise InvalidRequestError(NOT_ALLOWED, "path")
    return candidate


def _weights_in(folder: str) -> Iterator[str]:
    yield from sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX))


def _is_real(path: str, folders: Sequence[str]) -> bool:
    """Whether it lies in one of the folders when every symbolic link was followed."""
    real = os.path.realpath(path)
    roots = [os.path.realpath(folder) for folder in folders]
    return any(real == root or real.startswith(root + os.sep) for root in roots)


def _parts(address: str) -> list[str] | None:
    """The parts between slashes; None where one cannot stand in an address."""
    prefix = next((prefix for prefix in (S3, HERE, "/") if address.startswith(prefix)), "")
    parts = address.removeprefix(prefix).rstrip("/").split("/")
    return parts if all(_PART.fullmatch(part) and part not in (".", "..") for part in parts) else None


def _kind(address: str) -> str:
    return S3 if address.startswith(S3) else "/" if is_folder(address) else "hub"
