"""The spool with a real S3 server that is killed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from serve_app.storage.s3 import S3Storage
from serve_app.storage.spool import SpooledStorage, SpoolUploads
from tests.support.s3_server import S3Server, s3_server

KEY = "videos/2026/11/21/video_1-0.mp4"
DATA = bytes(range(256)) * 10


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        server.create_bucket("outputs")
        yield server


async def until_empty(uploads: SpoolUploads) -> None:
    """Round after round, as the ingress does it: after a call without an answer the breaker has pauses."""
    async with asyncio.timeout(30):
        while not await uploads.round():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.mark.rest
async def test_a_killed_s3_server_has_the_object_and_its_checksum_when_it_is_back(s3: S3Server, tmp_path: Path) -> None:
    with closing(S3Storage(s3.cloud_storage("outputs"), attempts=1)) as backend:
        storage = SpooledStorage(backend, tmp_path)
        uploads = SpoolUploads(storage, lambda key: asyncio.sleep(0))
        s3.kill()
        stored = await storage.store(KEY, DATA, "video/mp4", {"seed": "7"})
        assert stored.upload_pending
        assert not await uploads.round()
        await asyncio.to_thread(s3.start)
        await until_empty(uploads)
        with closing(s3.client()) as client:
            found = client.get_object(Bucket="outputs", Key=KEY)
            assert hashlib.sha256(found["Body"].read()).hexdigest() == stored.sha256
            assert (found["ContentType"], found["Metadata"]) == ("video/mp4", {"seed": "7"})
            s3.kill()
            await storage.delete(KEY)
            await asyncio.to_thread(s3.start)
            await until_empty(uploads)
            with pytest.raises(ClientError, match="NoSuchKey"):
                client.get_object(Bucket="outputs", Key=KEY)
