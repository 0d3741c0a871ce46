"""Where finished media go: STORAGE_BACKENDS names the places, `make_storage` opens the configured one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from deployments.errors import StorageError
from deployments.messages import GenerationRequest, MediaKind
from env_config.variables import CloudStorage
from serve_app.errors import ObjectNotFoundError

URLStyle = Literal["presigned", "public", "path"]

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}
_EXTENSIONS = {content_type: extension for extension, content_type in CONTENT_TYPES.items()}
_FOLDERS: dict[MediaKind, str] = {"image": "images", "video": "videos"}
_KEY = re.compile(r"(images|videos)/\d{4}/\d{2}/\d{2}/[A-Za-z0-9_-]{1,128}-\d{1,4}\.(png|jpeg|webp|mp4)", re.ASCII)

S3_CONNECT_TIMEOUT_S = 3
S3_READ_TIMEOUT_S = 30
S3_ATTEMPTS = 4  # botocore's standard mode waits up to 1, 2, 4 s between them
_CHECK_KEY = "triptych-startup-check"


@dataclass(frozen=True)
class StoredObject:
    """A stored file; `url` is where a caller gets it, relative to this server if it begins with a slash."""

    url: str
    key: str
    num_bytes: int
    sha256: str  # hexadecimal
    upload_pending: bool = False  # kept in this machine's spool until the storage takes it


class StorageBackend(Protocol):
    """A place for finished media. Every method may be called from any number of tasks at once."""

    is_shared: bool  # outlives this machine, so that every output belongs there

    async def check(self) -> None:
        """Write and remove a trial object; raises StorageError that names the variable to correct."""
        ...

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        """Store `data` under a key of `object_key`, whole or not at all; raises StorageError.

        `metadata` is kept where the place has room for it beside the object: S3 has (2 KB), a folder has not.
        """
        ...

    def url_of(self, key: str) -> str:
        """Where a caller gets the object now; some URLs end after a while."""
        ...

    async def load(self, key: str) -> tuple[bytes, str]:
        """The bytes and the content type; raises ObjectNotFoundError or StorageError."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the object; an object that is not there is no error. Raises StorageError."""
        ...


def make_storage(
    cloud: CloudStorage,
    local_folder: Path,
    base_url: str | None = None,
    url_style: URLStyle = "presigned",
    url_lifetime_s: int = 3600,
) -> StorageBackend:
    """The storage that SGLANG_CLOUD_STORAGE_TYPE names; `local_folder` if it is not set.

    `base_url` is the public address of this server, for URLs that lead through it; else they are relative.
    """
    backend = STORAGE_BACKENDS[cloud.type or "local"]
    return backend(StorageOptions(cloud, local_folder, base_url or "", url_style, url_lifetime_s))


def object_key(request: GenerationRequest, index: int, mime_type: str, now: datetime | None = None) -> str:
    """The key of a request's file number `index`, such as `images/2026/11/21/<request id>-0.png`."""
    day = f"{now or datetime.now(UTC):%Y/%m/%d}"
    key = f"{_FOLDERS[request.output.kind]}/{day}/{request.request_id}-{index}.{_EXTENSIONS[mime_type]}"
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key: the request id may have letters, digits, - and _ only")
    return key


def _known_shape(key: str) -> str:
    """Refuse what `object_key` cannot have made: nothing else in the folder or bucket can be reached."""
    if not _KEY.fullmatch(key):
        raise ObjectNotFoundError(f"there is no file {key[:200]!r}")
    return key


class LocalStorage:
    """A folder of this machine; files leave through the ingress, under /v1/files/."""

    is_shared = False

    def __init__(self, folder: Path, base_url: str = "") -> None:
        self.folder = folder
        self.base_url = base_url.rstrip("/")

    async def check(self) -> None:
        try:
            await asyncio.to_thread(write_whole, self.folder / _CHECK_KEY, b"")
            (self.folder / _CHECK_KEY).unlink()
        except OSError as error:
            raise StorageError(
                f"the output folder {str(self.folder)!r} cannot be written to ({error.strerror}); "
                "it is under SGLANG_DIFFUSION_CACHE_ROOT unless the application's arguments name another"
            ) from error

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        path = self.folder / _known_shape(key)
        try:
            await asyncio.to_thread(write_whole, path, data)
        except OSError as error:
            raise StorageError(f"the output could not be written to the local folder: {error.strerror}") from error
        return StoredObject(self.url_of(key), key, len(data), hashlib.sha256(data).hexdigest())

    def url_of(self, key: str) -> str:
        return file_url(self.base_url, key)

    async def load(self, key: str) -> tuple[bytes, str]:
        path = self.folder / _known_shape(key)
        try:
            data = await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError as error:
            raise ObjectNotFoundError(f"there is no file {key!r}") from error
        except OSError as error:
            raise StorageError(f"the file {key!r} could not be read: {error.strerror}") from error
        return data, CONTENT_TYPES[path.suffix[1:]]

    async def delete(self, key: str) -> None:
        path = self.folder / _known_shape(key)
        try:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        except OSError as error:
            raise StorageError(f"the file {key!r} could not be deleted: {error.strerror}") from error


def write_whole(path: Path, data: bytes) -> None:
    """A reader, or a restart after a crash, sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class S3Storage:
    """A bucket of S3 or of a server that speaks its protocol; sends a SHA-256 that the server verifies.

    `url_style`: `presigned` URLs read a private bucket for `url_lifetime_s` seconds, `public` ones are plain
    addresses of a bucket that anyone may read, `path` ones lead through this server (/v1/files/).
    """

    is_shared = True

    def __init__(
        self,
        cloud: CloudStorage,
        url_style: URLStyle = "presigned",
        url_lifetime_s: int = 3600,
        base_url: str = "",
        attempts: int = S3_ATTEMPTS,
    ) -> None:
        assert cloud.bucket_name, "CloudStorage requires SGLANG_S3_BUCKET_NAME with s3"
        self.cloud = cloud
        self.bucket = cloud.bucket_name
        self.url_lifetime_s = url_lifetime_s
        self.base_url = base_url.rstrip("/")
        self._url = {"presigned": self._presigned_url, "public": self._public_url, "path": self._path_url}[url_style]
        key_id, secret = cloud.access_key_id, cloud.secret_access_key
        self._client = boto3.session.Session().client(
            "s3",
            endpoint_url=cloud.endpoint_url,
            region_name=cloud.region_name,
            aws_access_key_id=key_id.get_secret_value() if key_id else None,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            config=Config(
                connect_timeout=S3_CONNECT_TIMEOUT_S,
                read_timeout=S3_READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": attempts},
                signature_version="s3v4",
                # Servers other than AWS seldom have a host name for each bucket.
                s3={"addressing_style": "path" if cloud.endpoint_url else "virtual"},
            ),
        )

    async def check(self) -> None:
        # A write, because its answer names the cause (bucket, key, secret, permission): a HEAD has none.
        await self._call("put_object", Key=_CHECK_KEY, Body=b"")
        await self._call("delete_object", Key=_CHECK_KEY)

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        digest = hashlib.sha256(data)
        await self._call(
            "put_object",
            Key=_known_shape(key),
            Body=data,
            ContentType=content_type,
            ChecksumSHA256=base64.b64encode(digest.digest()).decode("ascii"),
            Metadata={name: _header_text(value) for name, value in metadata.items()},
        )
        return StoredObject(self.url_of(key), key, len(data), digest.hexdigest())

    async def load(self, key: str) -> tuple[bytes, str]:
        answer = await self._call("get_object", Key=_known_shape(key))
        try:
            return await asyncio.to_thread(answer["Body"].read), answer["ContentType"]
        except (BotoCoreError, OSError) as error:
            raise self._storage_error(error) from error

    async def delete(self, key: str) -> None:
        await self._call("delete_object", Key=_known_shape(key))

    def url_of(self, key: str) -> str:
        return self._url(key)

    def close(self) -> None:
        self._client.close()

    async def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        method = getattr(self._client, operation)
        try:
            answer: dict[str, Any] = await asyncio.to_thread(method, Bucket=self.bucket, **arguments)
            return answer
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                raise ObjectNotFoundError(f"there is no file {arguments['Key']!r}") from error
            raise self._storage_error(error) from error
        except BotoCoreError as error:
            raise self._storage_error(error) from error

    def _presigned_url(self, key: str) -> str:
        arguments = {"Bucket": self.bucket, "Key": key}
        return str(self._client.generate_presigned_url("get_object", arguments, self.url_lifetime_s))

    def _public_url(self, key: str) -> str:
        if self.cloud.endpoint_url:
            return f"{self.cloud.endpoint_url.rstrip('/')}/{self.bucket}/{key}"
        return f"https://{self.bucket}.s3.{self.cloud.region_name}.amazonaws.com/{key}"

    def _path_url(self, key: str) -> str:
        return file_url(self.base_url, key)

    def _storage_error(self, error: Exception) -> StorageError:
        """One sentence that names the variable to correct, and never a secret."""
        place = _without_password(self.cloud.endpoint_url) if self.cloud.endpoint_url else "AWS"
        if isinstance(error, ClientError):
            code = error.response["Error"].get("Code", "an error")
            sentence = _S3_CODES.get(code, "{place} answered {code} for bucket {bucket!r}")
        else:
            code = type(error).__name__
            sentence = next(
                (text for kind, text in _S3_FAILURES if isinstance(error, kind)),
                "talking to {place} failed: {code}",
            )
        region = self.cloud.region_name
        return StorageError(sentence.format(place=place, bucket=self.bucket, region=region, code=code))


_WRONG_REGION = "bucket {bucket!r} is not in the region SGLANG_S3_REGION_NAME={region!r}"
_S3_CODES = {
    "NoSuchBucket": "there is no bucket SGLANG_S3_BUCKET_NAME={bucket!r} at {place}",
    "InvalidAccessKeyId": "{place} does not know the key in SGLANG_S3_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": ("SGLANG_S3_SECRET_ACCESS_KEY is not the secret of SGLANG_S3_ACCESS_KEY_ID at {place}"),
    "AccessDenied": "{place} does not allow this to the key in SGLANG_S3_ACCESS_KEY_ID for bucket {bucket!r}",
    "PermanentRedirect": _WRONG_REGION,
    "AuthorizationHeaderMalformed": _WRONG_REGION,
    "IllegalLocationConstraintException": _WRONG_REGION,
}
_UNREACHABLE = "{place} (SGLANG_S3_ENDPOINT_URL) cannot be reached: {code}"
_S3_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (
        NoCredentialsError,
        "no credentials for {place}: set SGLANG_S3_ACCESS_KEY_ID and SGLANG_S3_SECRET_ACCESS_KEY, "
        "or give boto3 some in a way of its own",
    ),
    (PartialCredentialsError, "boto3 found only a part of the credentials for {place}"),
    (ConnectionError, _UNREACHABLE),
    (HTTPClientError, _UNREACHABLE),
    (
        ParamValidationError,
        "S3 does not accept the name of the bucket, SGLANG_S3_BUCKET_NAME={bucket!r}, or metadata",
    ),
)


@dataclass(frozen=True)
class StorageOptions:
    """The arguments of make_storage; each backend takes what concerns it."""

    cloud: CloudStorage
    local_folder: Path
    base_url: str
    url_style: URLStyle
    url_lifetime_s: int


STORAGE_BACKENDS: dict[str, Callable[[StorageOptions], StorageBackend]] = {
    "local": lambda options: LocalStorage(options.local_folder, options.base_url),
    "s3": lambda options: S3Storage(options.cloud, options.url_style, options.url_lifetime_s, options.base_url),
}


def file_url(base_url: str, key: str) -> str:
    """The address of an object that leaves through this server; without `base_url` a path below its route prefix."""
    return f"{base_url}/v1/files/{key}"


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _header_text(value: str) -> str:
    """Metadata travel in HTTP headers: percent-encode what is not printable ASCII."""
    return quote(value, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}~")
