"""Finished media in a bucket of S3, or of a server that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import boto3
from botocore import UNSIGNED
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
from pydantic import BaseModel, ConfigDict, Field, field_validator

from deployments.errors import StorageError
from env_config.variables import CloudStorage
from serve_app.bounded_threads import BoundedThreads
from serve_app.errors import ObjectNotFoundError, StorageAwayError
from serve_app.storage.base import CHECK_BYTES, CHECK_KEY, StoredObject, URLStyle
from serve_app.storage.keys import file_url, known_shape

S3_CONNECT_TIMEOUT_S = 3
S3_READ_TIMEOUT_S = 20  # without a byte; how long a call may take in all is the caller's affair (guarded.py)
S3_ATTEMPTS = 3  # botocore's standard mode waits up to 1, 2 s between them
MAX_THREADS = 32
LONGEST_LIFETIME_S = 604_800  # of a presigned URL, as signature version 4 has it

Addressing = Literal["auto", "path", "virtual"]


class S3Args(BaseModel):
    """How the bucket is reached, beside what the variables SGLANG_S3_... say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    addressing: Addressing = Field(
        "auto",
        description="path: the bucket stands in the path; virtual: in the host; auto: as AWS has it, "
        "and with an endpoint of your own the first of the two that it answers",
    )
    public_endpoint: str | None = Field(
        None,
        description="the endpoint in presigned and public URLs, where callers reach S3 by another name",
    )
    url_lifetime_s: int = Field(
        3600, ge=1, le=LONGEST_LIFETIME_S, description="seconds for which a presigned URL can be read"
    )

    @field_validator("public_endpoint")
    @classmethod
    def check_endpoint(cls, url: str | None) -> str | None:
        """Raises ValueError."""
        if url is not None:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
                raise ValueError(f"must be a URL such as https://s3.example.com, got {_without_password(url)!r}")
        return url


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
        addressing: Addressing = "auto",
        public_endpoint: str | None = None,
    ) -> None:
        assert cloud.bucket_name, "CloudStorage requires SGLANG_S3_BUCKET_NAME with s3"
        self.cloud = cloud
        self.bucket = cloud.bucket_name
        self.url_lifetime_s = url_lifetime_s
        self.base_url = base_url.rstrip("/")
        self.attempts = attempts
        self.url_style = url_style
        self._url_endpoint = public_endpoint or _without_password(cloud.endpoint_url or "") or None
        self._styles = list(_addressing_styles(cloud.endpoint_url, addressing))  # the first is in use
        self._clients: dict[tuple[str, bool], Any] = {}
        self._session = boto3.session.Session()
        self._threads = BoundedThreads("s3", MAX_THREADS)

    async def check(self) -> None:
        # A write, because its answer names the cause (bucket, key, secret, permission): a HEAD has none.
        await self._put(CHECK_KEY, CHECK_BYTES, "text/plain", {"model": "none"})
        await self._call("delete_object", Key=CHECK_KEY)

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        digest = await self._put(known_shape(key), data, content_type, metadata)
        return StoredObject(self.url_of(key), key, len(data), digest)

    def url_of(self, key: str) -> str:
        if self.url_style == "path":
            return file_url(self.base_url, key)
        arguments = {"Bucket": self.bucket, "Key": key}
        client = self._client(self._styles[0], for_urls=True)
        return str(client.generate_presigned_url("get_object", arguments, self.url_lifetime_s))

    async def load(self, key: str) -> tuple[bytes, str]:
        return await self._answer_of(_read_object, Key=known_shape(key))  # type: ignore[no-any-return]

    async def delete(self, key: str) -> None:
        await self._call("delete_object", Key=known_shape(key))

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    async def _put(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> str:
        """The SHA-256 of what was written, hexadecimal."""
        digest = hashlib.sha256(data)
        await self._call(
            "put_object",
            Key=key,
            Body=data,
            ContentType=content_type,
            ChecksumSHA256=base64.b64encode(digest.digest()).decode("ascii"),
            Metadata={name: _header_text(value) for name, value in metadata.items()},
        )
        return digest.hexdigest()

    async def _call(self, operation: str, **arguments: Any) -> Any:
        return await self._answer_of(lambda client, **all_: getattr(client, operation)(**all_), **arguments)

    async def _answer_of(self, operation: Any, **arguments: Any) -> Any:
        """What `operation` returns, in the first way to address the bucket that the server does not refuse.

        Raises ObjectNotFoundError and StorageError, whatever boto raises.
        """
        refusal: Exception | None = None
        for style in list(self._styles):
            try:
                client = self._client(style)
                answer = await self._threads.run(operation, client, Bucket=self.bucket, **arguments)
            except Exception as error:  # noqa: BLE001  (broken answers make boto raise all sorts of errors)
                refusal = refusal or error  # the reason of the first way is the one to read
                if not isinstance(error, ClientError):
                    break
            else:
                self._styles = [style]
                return answer
        assert refusal is not None
        raise self._translated(refusal, arguments["Key"]) from refusal

    def _client(self, style: str, for_urls: bool = False) -> Any:
        """`for_urls`: it makes URLs and calls nobody."""
        if (style, for_urls) not in self._clients:
            cloud = self.cloud
            key_id, secret = cloud.access_key_id, cloud.secret_access_key
            is_unsigned = for_urls and self.url_style == "public"
            self._clients[style, for_urls] = self._session.client(
                "s3",
                endpoint_url=self._url_endpoint if for_urls else cloud.endpoint_url,
                region_name=cloud.region_name,
                aws_access_key_id=key_id.get_secret_value() if key_id else None,
                aws_secret_access_key=secret.get_secret_value() if secret else None,
                config=Config(
                    connect_timeout=S3_CONNECT_TIMEOUT_S,
                    read_timeout=S3_READ_TIMEOUT_S,
                    max_pool_connections=MAX_THREADS,
                    retries={"mode": "standard", "total_max_attempts": self.attempts},
                    signature_version=UNSIGNED if is_unsigned else "s3v4",
                    request_checksum_calculation="when_required",  # ours is sent; not all servers read trailers
                    response_checksum_validation="when_required",
                    s3={"addressing_style": style},
                ),
            )
        return self._clients[style, for_urls]

    def _translated(self, error: Exception, key: str) -> StorageError | ObjectNotFoundError:
        """One sentence that names the variable to correct, and never a secret."""
        if isinstance(error, ClientError) and error.response["Error"].get("Code") == "NoSuchKey":
            return ObjectNotFoundError(f"there is no file {key!r}")
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
        kind = StorageError if _is_an_answer(error) else StorageAwayError
        return kind(sentence.format(place=place, bucket=self.bucket, region=region, code=code))


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


def _addressing_styles(endpoint: str | None, asked: Addressing) -> tuple[str, ...]:
    """In the order in which they are tried, as botocore calls them."""
    if asked != "auto":
        return (asked,)
    if endpoint is None:
        return ("virtual",)  # botocore puts a bucket into the path where its name cannot stand in a host
    host = urlsplit(endpoint).hostname or ""
    return ("path", "virtual") if "." in host and not _is_address(host) else ("path",)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_an_answer(error: Exception) -> bool:
    """Whether the server looked at the call and refused it, or boto did: the next call may fare better."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return 300 <= status < 500 and error.response["Error"].get("Code") not in ("SlowDown", "RequestTimeout")
    return isinstance(error, BotoCoreError) and not isinstance(error, ConnectionError | HTTPClientError)


def _read_object(client: Any, **arguments: Any) -> tuple[bytes, str]:
    answer = client.get_object(**arguments)
    return answer["Body"].read(), answer["ContentType"]


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _header_text(value: str) -> str:
    """Metadata travel in HTTP headers: percent-encode what is not printable ASCII."""
    return quote(value, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}~")
