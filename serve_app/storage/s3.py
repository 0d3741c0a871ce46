"""Finished media in a bucket of S3, or of a server that speaks its protocol."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from typing import Any
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
from env_config.variables import CloudStorage
from serve_app.errors import ObjectNotFoundError
from serve_app.storage.base import CHECK_KEY, StoredObject, URLStyle
from serve_app.storage.keys import file_url, known_shape

S3_CONNECT_TIMEOUT_S = 3
S3_READ_TIMEOUT_S = 30
S3_ATTEMPTS = 4  # botocore's standard mode waits up to 1, 2, 4 s between them


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
        await self._call("put_object", Key=CHECK_KEY, Body=b"")
        await self._call("delete_object", Key=CHECK_KEY)

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        digest = hashlib.sha256(data)
        await self._call(
            "put_object",
            Key=known_shape(key),
            Body=data,
            ContentType=content_type,
            ChecksumSHA256=base64.b64encode(digest.digest()).decode("ascii"),
            Metadata={name: _header_text(value) for name, value in metadata.items()},
        )
        return StoredObject(self.url_of(key), key, len(data), digest.hexdigest())

    async def load(self, key: str) -> tuple[bytes, str]:
        answer = await self._call("get_object", Key=known_shape(key))
        try:
            return await asyncio.to_thread(answer["Body"].read), answer["ContentType"]
        except (BotoCoreError, OSError) as error:
            raise self._storage_error(error) from error

    async def delete(self, key: str) -> None:
        await self._call("delete_object", Key=known_shape(key))

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


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _header_text(value: str) -> str:
    """Metadata travel in HTTP headers: percent-encode what is not printable ASCII."""
    return quote(value, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}~")
