"""S3 as boto3 reaches it: objects opened with short time-outs, and what is wrong when one cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as ServerConnectionError

from deployments.errors import CheckpointError

PROBE_TIMEOUTS_S = {"connect_timeout": 2, "read_timeout": 5}

S3_CAUSES = {
    "NoSuchBucket": "the bucket does not exist",
    "NoSuchKey": "there is no such object",
    "InvalidRange": "the object is empty",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known to the server",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is wrong",
    "AccessDenied": "the credentials may not read it",
}

RangeReader = Callable[[int, int], bytes]  # (start, length)
ObjectOpener = Callable[[str], tuple[RangeReader, int]]  # location -> a reader, the size in bytes


def object_opener() -> ObjectOpener:
    """Opens objects of S3 with short time-outs.

    It asks for the first bytes rather than sending a HEAD, whose answers have no body to name the cause.
    """
    client = s3_client(**PROBE_TIMEOUTS_S, retries={"total_max_attempts": 1})

    def open_object(address: str) -> tuple[RangeReader, int]:
        bucket, _, key = address.removeprefix("s3://").partition("/")

        def get(start: int, length: int) -> Any:
            return client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")

        def read(start: int, length: int) -> bytes:
            with naming_the_cause(address):
                return bytes(get(start, length)["Body"].read()) if length else b""

        with naming_the_cause(address):
            first = get(0, 1)
            first["Body"].read()
        return read, int(first["ContentRange"].rpartition("/")[2])

    return open_object


def s3_client(**options: Any) -> Any:
    """With the endpoint and the credentials that boto3 finds (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID ...)."""
    return boto3.session.Session().client("s3", config=Config(**options))


@contextmanager
def naming_the_cause(address: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        cause = S3_CAUSES.get(code, f"the server answers {code}")
    except NoCredentialsError:
        cause = "no credentials were found (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    except (HTTPClientError, ServerConnectionError) as error:
        cause = f"the server cannot be reached: {error}"
    except BotoCoreError as error:
        cause = str(error)
    else:
        return
    raise CheckpointError(f"{address} cannot be read: {cause}")
