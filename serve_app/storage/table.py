"""Where finished media can go: STORAGE_BACKENDS names the places, `make_storage` opens the configured one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from env_config.variables import CloudStorage
from serve_app.storage.base import StorageBackend, URLStyle
from serve_app.storage.local import LocalStorage
from serve_app.storage.s3 import S3Args, S3Storage


@dataclass(frozen=True)
class StorageOptions:
    """The arguments of make_storage; each backend takes what concerns it."""

    cloud: CloudStorage
    local_folder: Path
    base_url: str
    url_style: URLStyle
    s3: S3Args


STORAGE_BACKENDS: dict[str, Callable[[StorageOptions], StorageBackend]] = {
    "local": lambda options: LocalStorage(options.local_folder, options.base_url),
    "s3": lambda options: S3Storage(
        options.cloud,
        options.url_style,
        options.s3.url_lifetime_s,
        options.base_url,
        addressing=options.s3.addressing,
        public_endpoint=options.s3.public_endpoint,
    ),
}


def make_storage(
    cloud: CloudStorage,
    local_folder: Path,
    base_url: str | None = None,
    url_style: URLStyle = "presigned",
    s3: S3Args | None = None,
) -> StorageBackend:
    """The storage that SGLANG_CLOUD_STORAGE_TYPE names; `local_folder` if it is not set.

    `base_url` is the public address of this server, for URLs that lead through it; else they are relative.
    """
    backend = STORAGE_BACKENDS[cloud.type or "local"]
    return backend(StorageOptions(cloud, local_folder, base_url or "", url_style, s3 or S3Args()))
